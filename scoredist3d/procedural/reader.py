"""The reader: a small network that reads the word on a sign or a mug from a 128x128 image.

It is trained only on renders, never on samples of a prior, so it can evaluate images from priors and from distillation.
Each of 64 columns of the image votes for a character or for none (connectionist temporal classification, CTC), so the
reader knows no words and reads unseen ones as well as those of its training data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.procedural.glyphs import CHARACTERS
from scoredist3d.procedural.packaged_network import PackagedNetwork

READER_SIZE = 128
BLANK = 0
"""Class of columns without a character; character k of CHARACTERS has class k + 1."""


class Reader(PackagedNetwork):
    """Convolutional network with about 0.3 million parameters.

    Each channel is normalized on its own, so that the colors of ink and background do not matter.

    Args:
        characters: Characters in the order of the outputs.
        width: Channels of the first stage.
    """

    name = "reader"

    def __init__(self, characters: str = CHARACTERS, *, width: int = 24) -> None:
        super().__init__()
        self.characters, self.width = characters, width
        channels = [width, 2 * width, 3 * width, 3 * width]
        strides: list[int | tuple[int, int]] = [2, 2, (2, 1), (2, 1)]
        layers: list[nn.Module] = []
        inner = 3
        for outer, stride in zip(channels, strides, strict=True):
            layers += [nn.Conv2d(inner, outer, 3, stride=stride, padding=1), nn.GroupNorm(outer, outer), nn.SiLU()]
            layers += [nn.Conv2d(outer, outer, 3, padding=1), nn.GroupNorm(outer, outer), nn.SiLU()]
            inner = outer
        self.body = nn.Sequential(*layers)
        self.attention = nn.Conv2d(inner, 1, 1)
        classes = len(characters) + 1
        # Each of the 32 columns of the features scores two, so that narrow letters and their gaps have one each.
        last = nn.Conv1d(4 * width, 2 * classes, 1)
        self.line = nn.Sequential(
            nn.Conv1d(2 * inner, 4 * width, 5, padding=2),
            nn.GroupNorm(4 * width, 4 * width),
            nn.SiLU(),
            nn.Conv1d(4 * width, 4 * width, 5, padding=2),
            nn.GroupNorm(4 * width, 4 * width),
            nn.SiLU(),
            last,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, 64, characters + 1) of each column for (B, H, W, 3) images in [0, 1].

        Images of other sizes are resized to 128x128.
        """
        pixels = images.movedim(-1, 1)
        if pixels.shape[-2:] != (READER_SIZE, READER_SIZE):
            pixels = functional.interpolate(pixels, (READER_SIZE, READER_SIZE), mode="bilinear", antialias=True)
        maps = self.body(2.0 * pixels - 1.0)
        weights = self.attention(maps).softmax(2)
        columns = torch.cat([(weights * maps).sum(2), maps.amax(2)], 1)
        scores = self.line(columns).float().movedim(1, 2)
        return functional.log_softmax(scores.unflatten(2, (2, -1)).flatten(1, 2), -1)

    def loss(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """Negative log-likelihood per character of the words for images (B, H, W, 3), (B,), differentiable.

        Raises:
            ValueError: A word is empty or has characters that the reader does not know.
        """
        scores = self(images).movedim(0, 1)
        targets, lengths = self.encode(words)
        columns = torch.full((len(words),), scores.shape[0], dtype=torch.int64)
        nll = functional.ctc_loss(scores, targets.to(scores.device), columns, lengths, blank=BLANK, reduction="none")
        return nll / lengths.to(nll.device)

    def encode(self, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Classes of the characters of words, concatenated, (total,) int64, and the length of each word, (B,) int64.

        Raises:
            ValueError: A word is empty or has characters that the reader does not know.
        """
        classes = []
        for word in words:
            found = [self.characters.find(character) + 1 for character in word.upper()]
            if not found or BLANK in found:
                raise ValueError(f"words: the reader cannot read {word!r}; use the characters {self.characters}")
            classes.append(found)
        flat = [index for found in classes for index in found]
        return torch.tensor(flat), torch.tensor([len(found) for found in classes])

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The most likely characters of (B, H, W, 3) images in [0, 1], in upper case; empty where there are none."""
        words = []
        for row in self(images).argmax(-1).tolist():
            kept = [index for k, index in enumerate(row) if index != BLANK and (k == 0 or row[k - 1] != index)]
            words.append("".join(self.characters[index - 1] for index in kept))
        return words

    def config(self) -> dict[str, object]:
        """The arguments of the constructor, which :meth:`load` reads from ``config.json``."""
        return {"characters": self.characters, "width": self.width}


def exact_match(read: Sequence[str], words: Sequence[str]) -> float:
    """Fraction of words that were read without an error, in [0, 1]."""
    return sum(a == b.upper() for a, b in zip(read, words, strict=True)) / len(words)


def character_accuracy(read: Sequence[str], words: Sequence[str]) -> float:
    """One minus the edit distance of all words per character, not below 0 for any word, in [0, 1]."""
    kept = sum(max(0, len(b) - edit_distance(a, b.upper())) for a, b in zip(read, words, strict=True))
    return kept / sum(map(len, words))


def edit_distance(first: str, second: str) -> int:
    """Smallest number of characters to insert, delete or replace to turn one text into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
