"""View-dependent color as spherical harmonics (arXiv 2308.04079, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.materials.base import Material, ShadingInputs
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.color import clamp_unit
from scoredist3d.ops.shading.spherical_harmonics import DC, MAX_DEGREE, harmonics, num_coefficients
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register("material", "spherical-harmonics", summary="View-dependent color as spherical harmonics.", arxiv="2308.04079")
class SphericalHarmonics(Material):
    """View-dependent color rgb = clamp(1/2 + sum_k Y_k(d) f_k, 0, 1), d the unit direction from camera to point.

    The features are the RGB coefficients f_k in ascending order, the constant one first. Degrees are enabled one by
    one, because view-dependent colors can otherwise compensate for a wrong shape early in training. Outside [0, 1], the
    clamp passes gradients that lead back into the range, since the color could not return without them.

    Attributes:
        active_degree: Highest degree in use at the current step.
    """

    free_options = frozenset({"degree_every"})

    @dataclass
    class Config(Material.Config):
        """Options of spherical harmonics."""

        degree: int = option(3, "Highest degree; 0 means a view-independent color.", ge=0, le=MAX_DEGREE)
        degree_every: int = option(
            1000, "Steps after which the next degree is enabled; 0 enables all from the start.", ge=0
        )

    needs_view_dirs = True
    baked_lighting = True

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = 3 * num_coefficients(config.degree)
        self.needs_view_dirs = config.degree > 0
        self.update_step(0)

    def update_step(self, step: int) -> None:
        """Set ``active_degree`` for ``step``."""
        every = self.config.degree_every
        self.active_degree = self.config.degree if every == 0 else min(self.config.degree, step // every)

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) colors.

        Raises:
            ValueError: A degree above 0 is active, but the inputs have no view directions.
        """
        coefficients = inputs.features.unflatten(-1, (-1, 3))
        if self.active_degree == 0:
            return clamp_unit(0.5 + DC * coefficients[..., 0, :])
        if inputs.view_dirs is None:
            raise ValueError(
                "the spherical-harmonics material needs view directions above degree 0; set ShadingInputs.view_dirs"
            )
        basis = harmonics(inputs.view_dirs, self.active_degree)
        return clamp_unit(0.5 + torch.einsum("...k,...kc->...c", basis, coefficients[..., : basis.shape[-1], :]))

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """The constant term, which is the mean color over all directions, as the base color."""
        return SurfaceChannels((0.5 + DC * inputs.features[..., :3]).clamp(0.0, 1.0))

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, F): the base color as the constant term; all other coefficients are zero."""
        constant = (channels.base_color - 0.5) / DC
        return torch.nn.functional.pad(constant, (0, self.num_features - 3))

    def harmonics(self, features: Tensor) -> Tensor | None:
        """(N, K, 3) coefficients of degrees 1 to ``degree``; those above ``active_degree`` are 0."""
        if self.config.degree == 0:
            return None
        coefficients = features.unflatten(-1, (-1, 3)).clone()
        coefficients[:, num_coefficients(self.active_degree) :] = 0.0
        return coefficients[:, 1:]
