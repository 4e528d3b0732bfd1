"""Colour that depends on the direction of view, as spherical harmonics (arXiv 2308.04079, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.materials.base import Light, Material
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.color import clamp_unit
from scoredist3d.ops.shading.spherical_harmonics import DC, MAX_DEGREE, harmonics, num_coefficients
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "material",
    "spherical-harmonics",
    summary="Colour that depends on the direction of view, as spherical harmonics.",
    arxiv="2308.04079",
)
class SphericalHarmonics(Material):
    """rgb = clamp(1/2 + sum_k Y_k(d) f_k, 0, 1), with d the unit direction from the camera to the point.

    The features are the coefficients f_k, RGB by RGB: the constant one first. Degrees are switched on one after the
    other, so that the shape is not explained away by colours that each view sees differently. Where the clamp is
    active the gradient passes if it leads back into [0, 1]; a colour beyond the range could never return otherwise.

    Attributes:
        active_degree: Degrees above are left out.
    """

    free_options = frozenset({"degree_every"})

    @dataclass
    class Config(Material.Config):
        """Options of spherical harmonics."""

        degree: int = option(3, "Highest degree; 0 is a colour that all views share.", ge=0, le=MAX_DEGREE)
        degree_every: int = option(1000, "Steps after which the next degree is switched on; 0: all at once.", ge=0)

    needs_view_dirs = True
    baked_lighting = True

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = 3 * num_coefficients(config.degree)
        self.needs_view_dirs = config.degree > 0
        self.update_step(0)

    def update_step(self, step: int) -> None:
        """Degrees due at ``step``."""
        every = self.config.degree_every
        self.active_degree = self.config.degree if every == 0 else min(self.config.degree, step // every)

    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """(N, 3) colours.

        Raises:
            ValueError: No directions although a degree above 0 is switched on.
        """
        coefficients = features.unflatten(-1, (-1, 3))
        if self.active_degree == 0:
            return clamp_unit(0.5 + DC * coefficients[..., 0, :])
        if view_dirs is None:
            raise ValueError("the spherical-harmonics material needs the directions of view above degree 0")
        basis = harmonics(view_dirs, self.active_degree)
        return clamp_unit(0.5 + torch.einsum("...k,...kc->...c", basis, coefficients[..., : basis.shape[-1], :]))

    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """The mean colour over all directions: the constant part."""
        return SurfaceChannels((0.5 + DC * features[..., :3]).clamp(0.0, 1.0))

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, F): the base colour as the constant part, zero above."""
        constant = (channels.base_color - 0.5) / DC
        return torch.nn.functional.pad(constant, (0, self.num_features - 3))

    def harmonics(self, features: Tensor) -> Tensor | None:
        """(N, K, 3) coefficients of degrees 1 to ``degree``; those not yet switched on are 0."""
        if self.config.degree == 0:
            return None
        coefficients = features.unflatten(-1, (-1, 3)).clone()
        coefficients[:, num_coefficients(self.active_degree) :] = 0.0
        return coefficients[:, 1:]
