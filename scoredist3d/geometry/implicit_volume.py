"""Density field from a multiresolution hash grid and a small network (Instant-NGP, arXiv 2201.05989)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.config import option
from scoredist3d.geometry.base import GeometryInit, GeometryOutput
from scoredist3d.geometry.hash_field import HashField
from scoredist3d.geometry.trilinear import distance_grid, trilinear
from scoredist3d.meshes.sampling import points_in_ball, points_near
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

# exp(15) = 3.3e6 per radius is opaque within a millionth of the radius; above this exponent exp is continued linearly.
_MAX_EXPONENT = 15.0
# Target of a field that is initialized from a mesh: density inside, per radius (a layer of a tenth of the radius is
# 95 % opaque); width of the transition at the surface, as a fraction of the radius; minimum before the activation.
_SOLID_DENSITY = 30.0
_SOFT_WIDTH = 0.01
_EMPTY = -6.0
_DISTANCE_RESOLUTION = 64


@register(
    "geometry",
    "implicit-volume",
    summary="Density and features from a hash grid and a small network.",
    arxiv="2201.05989",
)
class ImplicitVolume(HashField):
    """Density tau(x) = act(f(x) + b(x)) / radius inside the ball, 0 outside; features are the network's other outputs.

    f is the network's first output, and b a blob that places the initial density at the center. With u = |x| / radius
    and strength lambda, ``blob_dreamfusion`` is lambda exp(-u^2 / (2 s^2)) (DreamFusion, appendix) and ``blob_magic3d``
    is lambda (1 - u / s) (Magic3D). The division by the radius makes optical depth independent of the scene's scale.
    """

    @dataclass
    class Config(HashField.Config):
        """Options of the implicit volume."""

        density_activation: Literal["softplus", "trunc-exp"] = option(
            "softplus",
            "Activation of the density; trunc-exp is exp with a linear continuation for large arguments.",
        )
        density_blob: Literal["blob_magic3d", "blob_dreamfusion", "none"] = option(
            "blob_magic3d", "Blob added before the activation, so that optimization starts from a ball."
        )
        density_blob_strength: float = option(10.0, "Height of the blob before the activation (lambda).")
        density_blob_size: float = option(
            0.5,
            "Zero crossing of blob_magic3d or standard deviation of blob_dreamfusion (s), as a fraction of the radius.",
            gt=0,
        )

    config: Config
    outward_sign = -1.0

    def density(self, points: Tensor) -> Tensor:
        """(N,) densities at (N, 3) world points."""
        distance = points.norm(dim=-1) / self.radius
        return self._activate(self._value_at(points, distance), distance)

    def init_from(self, source: GeometryInit, rng: Rng) -> str:
        """Fit the density to the solid bounded by the source's mesh, and the features near its surface."""
        like = self.table
        distances = distance_grid(source.mesh, self.radius, _DISTANCE_RESOLUTION).to(like)
        near = points_near(source.mesh, 0.02 * self.radius, like)
        band = 0.05 * self.radius

        def points(generator: torch.Generator, count: int) -> Tensor:
            anywhere = points_in_ball(generator, count // 2, self.radius).to(like)
            return torch.cat([near(generator, count - len(anywhere)), anywhere])

        def masked(where: Tensor, value: Tensor, features: Tensor) -> Tensor:
            """(N, 1 + F) values, and features set to zero away from the surface."""
            close = trilinear(distances, where, self.radius).abs() < band
            return torch.cat([value[:, None], features * close[:, None]], dim=-1)

        def predicted(where: Tensor) -> Tensor:
            value, features = self._evaluate(where, where.norm(dim=-1) / self.radius)
            return masked(where, value, features)

        def wanted(where: Tensor) -> Tensor:
            features = where.new_zeros(len(where), self.num_features)
            if source.features is not None:
                features = source.features(where)
            return masked(where, self._solid(trilinear(distances, where, self.radius)), features)

        error = self._fit(predicted, wanted, points, rng, steps=400)
        return (
            f"density and features fitted to the mesh with an RMS error of {error:.3g} (target density inside: "
            f"{_SOLID_DENSITY:g})"
        )

    def _solid(self, distance: Tensor) -> Tensor:
        """(N,) target values, before the activation, for a solid object at signed distances (N,)."""
        inside = _SOLID_DENSITY * torch.sigmoid(-distance / (_SOFT_WIDTH * self.radius))
        if self.config.density_activation == "softplus":
            return torch.where(inside > 20.0, inside, inside.clamp(math.exp(_EMPTY), 20.0).expm1().log())
        return inside.clamp_min(math.exp(_EMPTY)).log()

    def _value(self, raw: Tensor, points: Tensor, distance: Tensor) -> Tensor:
        """f(x) + b(x)."""
        return raw + self._blob(distance)

    def _output(self, value: Tensor, features: Tensor, gradient: Tensor | None, distance: Tensor) -> GeometryOutput:
        """Density, features and normals."""
        return GeometryOutput(self._activate(value, distance), features, self._outward(gradient))

    def _blob(self, distance: Tensor) -> Tensor | float:
        """b(x) at ``distance`` = |x| / radius."""
        strength, size = self.config.density_blob_strength, self.config.density_blob_size
        if self.config.density_blob == "blob_magic3d":
            return strength - (strength / size) * distance
        if self.config.density_blob == "blob_dreamfusion":
            return strength * torch.exp(distance.square() * (-0.5 / size**2))
        return 0.0

    def _activate(self, raw: Tensor, distance: Tensor) -> Tensor:
        """(N,) densities from values before the activation (N,), where ``distance`` (N,) is |x| / radius."""
        density = F.softplus(raw) if self.config.density_activation == "softplus" else _truncated_exp(raw)
        return density * ((distance <= 1.0).to(density.dtype) / self.radius)


def _truncated_exp(x: Tensor) -> Tensor:
    """exp(x), continued by its tangent above x = 15, so that large densities have finite values and gradients."""
    linear = (x - _MAX_EXPONENT).clamp_min(0.0)
    return x.clamp_max(_MAX_EXPONENT).exp() * (1.0 + linear)
