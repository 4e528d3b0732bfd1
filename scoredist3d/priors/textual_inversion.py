"""Textual inversion (arXiv 2208.01618): learned embeddings of new tokens, added to tokenizers and text encoders."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.config import Block, option
from scoredist3d.priors.model_files import PICKLE_KEY, PriorError, first_line, read_weights, weight_file
from scoredist3d.tensor_files import LOADING_ERRORS, load_tensors

_FILE = "learned_embeds.safetensors"
_PICKLES = (".pt", ".bin")
_UNNAMED = ("emb_params", "*", "")
"""Names of tensors in files whose token is the name of the file."""
_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Names of the tensors in files for two text encoders, and the encoders in the pipeline's index."""
MAX_VECTORS = 1000
"""Vectors of one token, which are positions of the prompt."""


@dataclass
class TextualInversionOptions(Block):
    """One textual inversion and its token."""

    path: str = option(help="A .safetensors file, a folder, or a hub id owner/model.")
    token: str | None = option(
        None, "Text that stands for the embedding in prompts; null is the one that the file names."
    )
    file: str | None = option(None, f"Name of the file in the folder or repository; null is {_FILE}.")


@dataclass(frozen=True)
class TextualInversion:
    """A token and its embeddings.

    Attributes:
        name: The file.
        token: Text that stands for the embeddings in prompts.
        embeddings: (n, D) for each text encoder, by its name in the pipeline's index. Tokens of n > 1 vectors are n
            tokens.
        key: Configuration key that holds the name of the file, for error messages.
    """

    name: str
    token: str
    embeddings: Mapping[str, Tensor] = field(repr=False)
    key: str = "prior.textual_inversion"

    @classmethod
    def read(cls, options: TextualInversionOptions, key: str, *, allow_pickle: bool) -> TextualInversion:
        """Read a file in the formats of diffusers and of AUTOMATIC1111.

        Args:
            options: The file and its token.
            key: Configuration key that holds the options, for error messages.
            allow_pickle: Whether files in pickle format are read.

        Raises:
            PriorError: The file is missing, damaged, or of another kind.
        """
        path = weight_file(options.path, options.file, _FILE, key, (".safetensors", *_PICKLES))
        if path.suffix in _PICKLES:
            token, tensors = _read_pickle(path, key, allow_pickle)
        else:
            tensors = read_weights(path, key)[0]
            token = next(iter(tensors)) if len(tensors) == 1 else ""
        if len(tensors) > 1:
            tensors = {_PARTS[name]: tensor for name, tensor in tensors.items() if name in _PARTS}
        else:
            tensors = dict.fromkeys(["text_encoder"] if tensors else [], next(iter(tensors.values()), torch.empty(0)))
        embeddings = {part: tensor[None] if tensor.ndim == 1 else tensor for part, tensor in tensors.items()}
        token = (options.token or (path.stem if token in _UNNAMED else token)).strip()
        fits = all(each.ndim == 2 and 0 < len(each) <= MAX_VECTORS for each in embeddings.values())
        if not embeddings or not fits or len({len(each) for each in embeddings.values()}) > 1 or not token:
            raise PriorError(
                f"{key}: {path} is not a textual inversion, which has the vectors of one token, for one text encoder "
                "or as clip_l and clip_g; use another file"
            )
        return cls(str(path), token, embeddings, key)

    def apply(self, part: str, network: nn.Module, tokenizer: Any) -> dict[str, str]:
        """Add the token to a tokenizer and the vectors to its text encoder.

        Returns:
            The token, and the tokens of all its vectors as text; empty if there are no vectors for this text encoder.

        Raises:
            PriorError: The token is already in the vocabulary, or the vectors have another width.
        """
        vectors = self.embeddings.get(part)
        if vectors is None:
            return {}
        tokens = [self.token, *(f"{self.token}_{number}" for number in range(1, len(vectors)))]
        known = set(tokenizer.get_vocab()).intersection(tokens)
        if known:
            raise PriorError(
                f"{self.key}: the {part} already knows the token {min(known)!r} of {self.name}; set another one with "
                "token"
            )
        embedding: Any = network.get_input_embeddings()  # type: ignore[operator]
        if vectors.shape[1] != embedding.weight.shape[1]:
            raise PriorError(
                f"{self.key}: {self.name} has vectors of width {vectors.shape[1]}, and the {part} of the model has "
                f"width {embedding.weight.shape[1]}; use one that was learned with the same base model"
            )
        tokenizer.add_tokens(tokens)
        _add_rows(network, embedding, tokenizer.convert_tokens_to_ids(tokens), vectors)
        return {self.token: " ".join(tokens)}


def read_textual_inversions(
    given: str | Sequence[str | TextualInversionOptions] | None, parts: Container[str], *, allow_pickle: bool
) -> tuple[TextualInversion, ...]:
    """The files of the option ``prior.textual_inversion``.

    Args:
        given: The option.
        parts: Names of the parts of the pipeline.
        allow_pickle: Whether files in pickle format are read.

    Raises:
        PriorError: A file cannot be used; see :meth:`TextualInversion.read`.
    """
    items = [given] if isinstance(given, str) else list(given or ())
    options = [TextualInversionOptions(path=item) if isinstance(item, str) else item for item in items]
    found = tuple(TextualInversion.read(each, "prior.textual_inversion", allow_pickle=allow_pickle) for each in options)
    for inversion in found:
        absent = next((part for part in inversion.embeddings if part not in parts), None)
        if absent is not None:
            raise PriorError(
                f"{inversion.key}: {inversion.name} has vectors for a {absent}, which the model does not have; use one "
                "that was learned with the same base model"
            )
    return found


def _add_rows(network: nn.Module, embedding: nn.Embedding, ids: list[int], vectors: Tensor) -> None:
    """Replace the embedding of a text encoder by one that also has rows for new tokens."""
    old = embedding.weight.detach()
    weight = old.new_zeros(max(len(old), max(ids) + 1), old.shape[1])
    weight[: len(old)] = old
    weight[ids] = vectors.to(old.dtype)
    larger = nn.Embedding.from_pretrained(weight, freeze=True, padding_idx=embedding.padding_idx)
    network.set_input_embeddings(larger.eval())  # type: ignore[operator]


def _read_pickle(path: Path, key: str, allowed: bool) -> tuple[str, dict[str, Tensor]]:
    """The token and the tensors of a pickle of diffusers or AUTOMATIC1111."""
    if not allowed:
        raise PriorError(f"{key}: {path} is a pickle; convert it to safetensors, or set {PICKLE_KEY}=true")
    try:
        content = load_tensors(path)
        if isinstance(content, dict) and "string_to_param" in content:
            token, tensors = str(content.get("name", "")), {"*": content["string_to_param"]["*"]}
        else:
            token, tensors = (next(iter(content)) if len(content) == 1 else ""), dict(content)
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("it has other values than tensors")
        return str(token), {name: torch.as_tensor(tensor).detach() for name, tensor in tensors.items()}
    except LOADING_ERRORS as error:
        raise PriorError(
            f"{key}: {path} is not a file of plain tensors: {first_line(error)}; use another one"
        ) from error
