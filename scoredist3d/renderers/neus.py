"""Unbiased volume rendering of signed distance fields (NeuS, arXiv 2106.10689)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoredist3d.backgrounds.base import Background
from scoredist3d.config import option
from scoredist3d.geometry.base import GeometryOutput, SignedDistanceField
from scoredist3d.geometry.protocols import HasSignedDistance
from scoredist3d.materials.base import Material
from scoredist3d.ops.volume_rendering.compositing import transmittance
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples
from scoredist3d.registry import register
from scoredist3d.renderers.volume import RenderRequest, VolumeRenderer
from scoredist3d.seeding import Rng


@register("renderer", "neus-volume", summary="Unbiased volume rendering of signed distance fields.", arxiv="2106.10689")
class NeuSRenderer(VolumeRenderer):
    """Volume renderer of signed distances with alpha_i = max(0, 1 - Phi(sdf_{i+1}) / Phi(sdf_i)) (equation 13).

    Phi(x) is 1 / (1 + exp(-s x)), with a learned s. sdf_i and sdf_{i+1} are the distances at the ends of an interval,
    extrapolated from its midpoint with the slope g = grad sdf . v along the ray. The slope is not the cosine n . v, so
    a gradient whose norm differs from 1 does not shift the surface. The samples are composited with the equivalent
    optical depth log Phi(sdf_i) - log Phi(sdf_{i+1}), which is accurate for alpha close to 1 and allows the code of the
    volume renderer to be reused.

    The slope is min(0, g), which gives no gradient to surfaces that face away from the camera. Until
    ``cos_anneal_steps``, it is therefore interpolated with -(|grad sdf| - g) / 2, which is at least as steep (the
    authors' code uses 1 in place of |grad sdf|).
    """

    @dataclass
    class Config(VolumeRenderer.Config):
        """Options of NeuS."""

        inv_std: float = option(
            20.0, "Initial value of s in units of 1 / radius; larger values give sharper surfaces.", gt=0
        )
        cos_anneal_steps: int = option(
            1000, "Steps over which the gradient of surfaces that face away from the camera fades to 0.", ge=0
        )

    config: Config
    supports = HasSignedDistance

    def __init__(
        self,
        config: Config,
        *,
        geometry: SignedDistanceField,
        material: Material,
        background: Background,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(config, geometry=geometry, material=material, background=background, rng=rng)
        geometry.freeze_extinction()
        self.log_inv_std = nn.Parameter(torch.tensor(math.log(config.inv_std)))

    @property
    def geometry(self) -> SignedDistanceField:
        """The rendered signed distance field."""
        return cast(SignedDistanceField, super().geometry)

    @property
    def inv_std(self) -> Tensor:
        """The inverse standard deviation s, per scene unit."""
        return self.log_inv_std.exp() / self.geometry.radius

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The group ``inv_std``, and also ``proposal`` if the estimator is ``proposal``."""
        return [*super().parameter_groups(), {"name": "inv_std", "params": [self.log_inv_std]}]

    def _needs_normal(self, request: RenderRequest) -> bool:
        return True

    def _needs_view_dirs(self, request: RenderRequest) -> bool:
        return True

    def _extinction_at(self, points: Tensor) -> Tensor:
        """d log Phi / d sdf = s (1 - Phi), the extinction along a ray that hits the surface head-on."""
        return self.inv_std * torch.sigmoid(-self.inv_std * self.geometry.sdf(points))

    def _extinction(self, values: GeometryOutput, samples: RaySamples, view_dirs: Tensor | None, step: int) -> Tensor:
        """(M,) extinctions (log Phi(sdf_i) - log Phi(sdf_{i+1})) / (length of the interval).

        Raises:
            ValueError: The geometry returned no signed distances or gradients.
        """
        if values.sdf is None or values.gradient is None or view_dirs is None:
            raise ValueError(
                "renderer.type: neus-volume needs a geometry that returns signed distances and their gradients; "
                "use renderer.type=volume"
            )
        along = (values.gradient * view_dirs).sum(-1)
        steps = self.config.cos_anneal_steps
        done = min(1.0, step / steps) if steps > 0 else 1.0
        slope = -done * F.relu(-along)
        if done < 1.0:
            slope = slope - (0.5 - 0.5 * done) * F.relu(values.gradient.norm(dim=-1) - along)
        half = 0.5 * slope * samples.lengths
        # log Phi(x) = -softplus(-s x)
        sharpness = self.inv_std
        depth = F.softplus(-sharpness * (values.sdf + half)) - F.softplus(-sharpness * (values.sdf - half))
        return depth.clamp_min(0.0) / samples.lengths.clamp_min(1e-12)

    def _transmittance(self, samples: RaySamples, points: Tensor) -> Tensor:
        """(M,) upper bounds on the transmittance, computed only from the signed distances at the midpoints."""
        before = F.softplus(-self.inv_std * self.geometry.sdf(points))
        lost = (before[1:] - before[:-1]).clamp_min(0.0) * (samples.ray_indices[1:] == samples.ray_indices[:-1])
        # Entry i is the optical depth between the midpoints of i - 1 and i; it counts from interval i + 1 on.
        lost = F.pad(lost, (1, 0))
        return transmittance(lost / samples.lengths.clamp_min(1e-12), samples)
