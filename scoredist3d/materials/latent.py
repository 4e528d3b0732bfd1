"""Rendering in the latent space of the prior (Latent-NeRF, arXiv 2211.07600)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.config import FieldError, option
from scoredist3d.materials.base import Material, ShadingInputs
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.color import clamp_unit
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_NUM_IMAGES = 2
_RIDGE = 1e-4
_fits: weakref.WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
"""Linear maps by prior. A fit encodes two images, and a run with several scenes needs it only once."""


@register(
    "material",
    "latent",
    summary="Features are latents of the prior; a linear map converts them to colors.",
    arxiv="2211.07600",
)
class Latent(Material):
    """Latent features l with colors rgb = clamp(l W + b), W (C, 3).

    With ``output: latents``, renders are latents, and the guidance skips the encoder of the prior and its gradient. One
    ray per latent pixel is enough. With ``output: rgb``, features are converted to colors by the linear map, which is
    optimized too, and the prior encodes the images. The state dict has the same keys in both cases, so a run can start
    in latent space and continue in color.

    W and b are initialized by a least-squares fit between smooth random images and their latents.
    """

    baked_lighting = True
    free_options = frozenset({"output"})

    @dataclass
    class Config(Material.Config):
        """Options of latent renders."""

        output: Literal["latents", "rgb"] = option(
            "latents", "Render latents, or colors computed from them by a linear map; rgb also optimizes the map."
        )

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        """Args:
        config: Options.
        prior: The :class:`~scoredist3d.priors.base.Prior` of the run, in whose latent space the material renders.

        Raises:
            ValueError: ``prior`` is None.
        """
        super().__init__(config)
        if prior is None:
            raise FieldError(
                "latent needs a prior, in whose latent space it renders; pass prior= or use another type", "type"
            )
        self.outputs_latents = config.output == "latents"
        weights, bias = latent_colors(prior)
        # When latents are optimized, their display must stay comparable between steps.
        self.weights = nn.Parameter(weights.clone(), requires_grad=not self.outputs_latents)
        self.bias = nn.Parameter(bias.clone(), requires_grad=not self.outputs_latents)
        self.num_features = len(weights)
        self.num_channels = self.num_features if self.outputs_latents else 3

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, C) latents, or (N, 3) colors in [0, 1]."""
        if self.outputs_latents:
            return inputs.features
        return clamp_unit(inputs.features @ self.weights + self.bias)

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """The colors of the latents, as the base color."""
        return SurfaceChannels((inputs.features @ self.weights + self.bias).clamp(0.0, 1.0))

    def display(self, values: Tensor) -> Tensor:
        """(..., 3) colors of rendered latents; rendered colors are returned unchanged."""
        if not self.outputs_latents:
            return values
        return (values @ self.weights + self.bias).clamp(0.0, 1.0)

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, C): the latents of least norm whose color is the base color."""
        return (channels.base_color - self.bias) @ torch.linalg.pinv(self.weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters of the linear map, if it is optimized."""
        return [] if self.outputs_latents else super().parameter_groups()


@torch.no_grad()
def latent_colors(prior: Any) -> tuple[Tensor, Tensor]:
    """Least-squares linear map from the latents of a prior to colors: W (C, 3) and b (3), on the CPU.

    The fit uses smooth random images with a fixed seed, so the result depends on the prior alone.
    """
    if prior not in _fits:
        _fits[prior] = _fit(prior)
    return _fits[prior]


def _fit(prior: Any) -> tuple[Tensor, Tensor]:
    """:func:`latent_colors` without the cache."""
    images = _images(prior.image_size)
    held = next(iter([*prior.parameters(), *prior.buffers()]), None)
    latents = prior.encode(images if held is None else images.to(held.device)).float().cpu()
    small = functional.interpolate(images.movedim(-1, 1), latents.shape[2:], mode="area")
    x, y = (values.movedim(1, -1).flatten(0, 2).double() for values in (latents, small))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x / len(x)
    # Regularize, so that a channel that is constant over the images gets no large weight.
    gram = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, x.T @ y / len(x))
    return weights.float(), (y_mean - x_mean @ weights).float()


def _images(size: int) -> Tensor:
    """(2, S, S, 3) images in [0, 1]: random colors on grids of 4 x 4 and 8 x 8 points, bicubically interpolated."""
    generator = Rng()("latent-colors")
    images = []
    for index in range(_NUM_IMAGES):
        points = torch.rand(1, 3, 4 << index, 4 << index, generator=generator)
        images.append(functional.interpolate(points, (size, size), mode="bicubic", align_corners=False))
    return torch.cat(images).clamp(0.0, 1.0).movedim(1, -1)
