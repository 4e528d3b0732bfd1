"""The probe: a small network that predicts category, colors, pattern and viewing azimuth from an image.

It is trained only on renders of the procedural objects, never on samples of the prior, so it can evaluate images from
the prior and from distillation. Its error on new renders is the lower bound to which measurements are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.procedural.packaged_network import PackagedNetwork


@dataclass(frozen=True)
class ProbeReading:
    """Predictions of the probe for ``B`` images.

    Attributes:
        category, color, second_color, pattern: (B, classes), log-probabilities.
        present: (B, categories), logits of each category's presence, for images of several objects; the
            log-probabilities of the category for a probe without them.
        direction: (B, 4, 2), unit vectors (cos k a, sin k a) of the azimuth a for the symmetry orders k = 1 to 4.
        features: (B, F), activations of the last hidden layer, for distances in feature space.
    """

    category: Tensor
    color: Tensor
    second_color: Tensor
    pattern: Tensor
    present: Tensor
    direction: Tensor
    features: Tensor

    def azimuth_error_deg(self, azimuth: Tensor, symmetry: Tensor) -> Tensor:
        """Absolute azimuth error in degrees, modulo each object's rotational symmetry, (B,).

        Args:
            azimuth: (B,), true azimuth in radians.
            symmetry: (B,), order k of the rotational symmetry about z; 1 means a unique front. For 0 the error is NaN,
                because the azimuth of a body of revolution is undefined.
        """
        order = symmetry.clamp(1, 4)
        direction = self.direction[torch.arange(len(order), device=order.device), order - 1]
        predicted = torch.atan2(direction[:, 1], direction[:, 0])
        difference = torch.remainder(predicted - order * azimuth + math.pi, 2 * math.pi) - math.pi
        error = torch.rad2deg(difference.abs() / order)
        return torch.where(symmetry > 0, error, torch.full_like(error, float("nan")))


class Probe(PackagedNetwork):
    """Convolutional network with up to a million parameters.

    Args:
        categories, colors, patterns: Class names, in the order of the outputs.
        width: Channels of the first stage; a multiple of 8.
        input_size: Height and width of the images that it was trained on, in pixels; a power of two.
        presence: Whether it was trained on scenes of several objects. The logits of ``present`` are the smooth maxima
            of logits at the 8x8 positions of the last feature maps.
        stem_stride: Stride of the first convolution.
        grid: Cells along each axis into which the last feature maps are averaged, beside their mean and maximum.
    """

    name = "probe"

    def __init__(
        self,
        categories: Sequence[str],
        colors: Sequence[str],
        patterns: Sequence[str],
        *,
        width: int = 24,
        input_size: int = 128,
        presence: bool = True,
        stem_stride: int = 1,
        grid: int = 2,
    ) -> None:
        super().__init__()
        self.categories, self.colors, self.patterns = tuple(categories), tuple(colors), tuple(patterns)
        self.width, self.input_size, self.presence = width, input_size, presence
        self.stem_stride, self.grid = stem_stride, grid
        stages = round(math.log2(input_size // stem_stride)) - 2  # the last one has 8x8 pixels
        channels = [3, *(width * (index + 1) for index in range(stages))]
        layers: list[nn.Module] = []
        for index, (inner, outer) in enumerate(pairwise(channels)):
            layers += [
                nn.Conv2d(inner, outer, 3, stride=2 if index else stem_stride, padding=1),
                nn.GroupNorm(8, outer),
                nn.SiLU(),
            ]
            layers += [
                nn.Conv2d(outer, outer, 3, padding=1, groups=1 if index < 3 else 4),
                nn.GroupNorm(8, outer),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.neck = nn.Sequential(nn.Linear((2 + grid**2) * channels[-1], 128), nn.SiLU())
        self.heads = nn.ModuleDict(
            {
                "category": nn.Linear(128, len(self.categories)),
                "color": nn.Linear(128, len(self.colors)),
                "second_color": nn.Linear(128, len(self.colors)),
                "pattern": nn.Linear(128, len(self.patterns)),
                "direction": nn.Linear(128, 8),
            }
        )
        if presence:
            self.heads["present"] = nn.Sequential(
                nn.Conv2d(channels[-1], 128, 1), nn.SiLU(), nn.Conv2d(128, len(self.categories), 1)
            )

    def forward(self, images: Tensor) -> ProbeReading:
        """Predictions for (B, H, W, 3) images in [0, 1]; images of other sizes are resized."""
        pixels = images.movedim(-1, 1)
        size = (self.input_size, self.input_size)
        if pixels.shape[-2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        maps = self.body(2.0 * pixels - 1.0)
        pooled = torch.cat(
            [maps.mean((2, 3)), maps.amax((2, 3)), functional.adaptive_avg_pool2d(maps, self.grid).flatten(1)], dim=1
        )
        features = self.neck(pooled)
        direction = self.heads["direction"](features).view(-1, 4, 2)
        category = functional.log_softmax(self.heads["category"](features), -1)
        return ProbeReading(
            category=category,
            color=functional.log_softmax(self.heads["color"](features), -1),
            second_color=functional.log_softmax(self.heads["second_color"](features), -1),
            pattern=functional.log_softmax(self.heads["pattern"](features), -1),
            direction=functional.normalize(direction, dim=-1),
            present=self.heads["present"](maps).logsumexp((2, 3)) if self.presence else category,
            features=features,
        )

    def config(self) -> dict[str, object]:
        """The arguments of the constructor, which :meth:`load` reads from ``config.json``."""
        names = {"categories": self.categories, "colors": self.colors, "patterns": self.patterns}
        options = ("width", "input_size", "presence", "stem_stride", "grid")
        return {**names, **{option: getattr(self, option) for option in options}}
