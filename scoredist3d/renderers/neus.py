"""Volume rendering of signed distances without a bias of the surface (NeuS, arXiv 2106.10689)."""

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
from scoredist3d.renderers.volume import VolumeRenderer, _Request
from scoredist3d.seeding import Rng


@register("renderer", "neus-volume", summary="Signed distances, opaque where a ray crosses zero.", arxiv="2106.10689")
class NeuSRenderer(VolumeRenderer):
    """alpha_i = max(0, 1 - Phi(sdf_{i+1}) / Phi(sdf_i)), with Phi(x) = 1 / (1 + exp(-s x)) and s learned (equation 13).

    sdf_i and sdf_{i+1} are those at the interval's ends, continued from its middle along the ray with the slope
    g = grad sdf . v. It is not taken for the cosine n . v, so that surfaces stay where they are when grad sdf is not of
    length 1. In place of alpha the optical depth log Phi(sdf_i) - log Phi(sdf_{i+1}) is handed on, which is the
    same, exact where alpha is close to 1, and makes everything else the volume renderer's.

    The slope is min(0, g), but that gives no gradient to surfaces that face away; until ``cos_anneal_steps`` it is
    mixed with -(|grad sdf| - g) / 2 (as in the authors' code, with 1 for the length there), which is never less steep.
    """

    @dataclass
    class Config(VolumeRenderer.Config):
        """Options of NeuS."""

        inv_std: float = option(20.0, "s at the start, in units of 1 / radius; larger is sharper.", gt=0)
        cos_anneal_steps: int = option(1000, "Steps until only surfaces that face the camera count.", ge=0)

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
        """What is rendered."""
        return cast(SignedDistanceField, super().geometry)

    @property
    def inv_std(self) -> Tensor:
        """s, per scene unit."""
        return self.log_inv_std.exp() / self.geometry.radius

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``inv_std``, and ``proposal`` where there is one."""
        return [*super().parameter_groups(), {"name": "inv_std", "params": [self.log_inv_std]}]

    def _needs_normal(self, request: _Request) -> bool:
        return True

    def _needs_view_dirs(self, request: _Request) -> bool:
        return True

    def _extinction_at(self, points: Tensor) -> Tensor:
        """-d log Phi / d sdf = s (1 - Phi): the extinction of a surface that is seen from the front."""
        return self.inv_std * torch.sigmoid(-self.inv_std * self.geometry.sdf(points))

    def _extinction(self, values: GeometryOutput, samples: RaySamples, view_dirs: Tensor | None, step: int) -> Tensor:
        """(M,): (log Phi(sdf at the start) - log Phi(sdf at the end)) / length."""
        if values.sdf is None or values.gradient is None or view_dirs is None:
            raise ValueError("neus-volume needs signed distances, gradients and directions of view at every sample")
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
        """From middle to middle, so that the distances alone tell: what has been lost before the interval before."""
        before = F.softplus(-self.inv_std * self.geometry.sdf(points))
        lost = (before[1:] - before[:-1]).clamp_min(0.0) * (samples.ray_indices[1:] == samples.ray_indices[:-1])
        # Entry i is what is lost on the way to the middle of i, which counts for the intervals after i.
        lost = F.pad(lost, (1, 0))
        return transmittance(lost / samples.lengths.clamp_min(1e-12), samples)
