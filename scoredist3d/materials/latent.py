"""Renders in the prior's latent space, and their continuation in colour (Latent-NeRF, arXiv 2211.07600)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.config import FieldError, option
from scoredist3d.materials.base import Light, Material
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.color import clamp_unit
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_PICTURES = 2
_RIDGE = 1e-4
_fits: weakref.WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
"""Maps of the priors of this process: each takes two passes of an encoder, and a run may build several scenes."""


@register("material", "latent", summary="Features are the prior's latents, shown by a linear map.", arxiv="2211.07600")
class Latent(Material):
    """Latents l = features; what they look like is rgb = clamp(l W + b) with W (C, 3).

    With ``output: latents`` the render goes to the denoiser as it is, which spares the encoder and its gradient: the
    object may be drawn with one ray per latent. With ``output: rgb`` the same features are rendered through the linear
    map, which is then optimised too, and the prior's encoder sees an image as usual. Weights have the same names in
    both, so a scene can start in latents and go on in colour.

    W and b start as the least-squares fit of smooth random pictures to the latents that the prior gives them.
    """

    baked_lighting = True
    free_options = frozenset({"output"})

    @dataclass
    class Config(Material.Config):
        """Options of latent renders."""

        output: Literal["latents", "rgb"] = option(
            "latents", "Render latents for the denoiser, or their colours through the linear map, which then learns."
        )

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        """Args:
        config: Options.
        prior: The run's :class:`~scoredist3d.priors.base.Prior`; its latents are what is rendered.

        Raises:
            ValueError: No prior.
        """
        super().__init__(config)
        if prior is None:
            raise FieldError("latent needs the prior whose latents it renders; use another material", "type")
        self.makes_latents = config.output == "latents"
        weights, bias = latent_colors(prior)
        # What is shown of latents must not change under the optimiser that moves them.
        self.weights = nn.Parameter(weights.clone(), requires_grad=not self.makes_latents)
        self.bias = nn.Parameter(bias.clone(), requires_grad=not self.makes_latents)
        self.num_features = len(weights)
        self.num_channels = self.num_features if self.makes_latents else 3

    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """(N, C) latents, or (N, 3) colours in [0, 1]."""
        if self.makes_latents:
            return features
        return clamp_unit(features @ self.weights + self.bias)

    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """The colours of the latents."""
        return SurfaceChannels((features @ self.weights + self.bias).clamp(0.0, 1.0))

    def display(self, values: Tensor) -> Tensor:
        """(..., 3) colours of rendered latents; colours pass."""
        if not self.makes_latents:
            return values
        return (values @ self.weights + self.bias).clamp(0.0, 1.0)

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, C): the smallest latents that have the base colour."""
        return (channels.base_color - self.bias) @ torch.linalg.pinv(self.weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The linear map, where it is optimised."""
        return [] if self.makes_latents else super().parameter_groups()


@torch.no_grad()
def latent_colors(prior: Any) -> tuple[Tensor, Tensor]:
    """W (C, 3) and b (3) of the linear map from a prior's latents to colours that fits smooth random pictures best.

    The same for the same prior: the pictures have a fixed seed. On the CPU.
    """
    if prior not in _fits:
        _fits[prior] = _fit(prior)
    return _fits[prior]


def _fit(prior: Any) -> tuple[Tensor, Tensor]:
    pictures = _pictures(prior.image_size)
    held = next(iter([*prior.parameters(), *prior.buffers()]), None)
    latents = prior.encode(pictures if held is None else pictures.to(held.device)).float().cpu()
    small = functional.interpolate(pictures.movedim(-1, 1), latents.shape[2:], mode="area")
    x, y = (images.movedim(1, -1).flatten(0, 2).double() for images in (latents, small))
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x / len(x)
    # A channel that no picture moves must not be given a large weight.
    gram = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, x.T @ y / len(x))
    return weights.float(), (y_mean - x_mean @ weights).float()


def _pictures(size: int) -> Tensor:
    """(2, S, S, 3) in [0, 1]: random colours on 4 x 4 and 8 x 8 points, smoothly joined."""
    generator = Rng()("latent-colors")
    pictures = []
    for index in range(_PICTURES):
        points = torch.rand(1, 3, 4 << index, 4 << index, generator=generator)
        pictures.append(functional.interpolate(points, (size, size), mode="bicubic", align_corners=False))
    return torch.cat(pictures).clamp(0.0, 1.0).movedim(1, -1)
