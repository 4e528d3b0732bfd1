"""Tri-plane field: density and features from three axis-aligned feature planes (EG3D, arXiv 2112.07945)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoredist3d.config import option
from scoredist3d.geometry.base import Field, Geometry, GeometryInit, GeometryOutput
from scoredist3d.geometry.trilinear import distance_grid, trilinear
from scoredist3d.losses.base import Loss
from scoredist3d.materials.base import Material
from scoredist3d.meshes.sampling import points_in_ball, points_near
from scoredist3d.nn.mlp import MLP
from scoredist3d.nn.regression import fit_features
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng

_SOLID = 30.0  # density deep inside a solid object, per radius
_EMPTY = -6.0  # value before the activation of empty space
_SLOPE = 300.0  # decrease of that value per radius at the surface of a solid object
_OFFSET = 0.01  # distance of the finite-difference samples, as a fraction of the radius


@register("geometry", "tri-plane", summary="Density and features from three feature planes.", arxiv="2112.07945")
class TriPlane(Field):
    """Density softplus(f(x) + b(x)) / radius inside the ball, with b(x) = 10 (1 - |x| / s) for an initial ball.

    f and the features are the outputs of a small network on the sum of the three planes at x.

    Attributes:
        planes: (3, C, R, R), features on the planes yz, xz and xy over the cube around the ball.
    """

    @dataclass
    class Config(Field.Config):
        """Options of the tri-plane."""

        resolution: int = option(32, "Texels along each side of a plane.", ge=2)
        channels: int = option(8, "Number of channels of each plane.", ge=1)
        hidden_width: int = option(32, "Units of the hidden layer of the decoder.", ge=1)
        init_size: float = option(0.5, "Radius of the initial ball, as a fraction of the radius (s).", gt=0, le=1)

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = 3 if material is None else material.num_features
        generator = (rng or Rng()).shared()("geometry")
        shape = (3, config.channels, config.resolution, config.resolution)
        self.planes = nn.Parameter(0.1 * torch.randn(shape, generator=generator))
        self.decoder = MLP([config.channels, config.hidden_width, 1 + self.num_features], generator)

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """Values of the field at (N, 3) world points; normals from central differences."""
        values, features = self._evaluate(points)
        normal = None
        if with_normal:
            steps = _OFFSET * self.radius * torch.eye(3, device=points.device)
            shifted = (points[None, None] + torch.stack([steps, -steps])[:, :, None]).reshape(-1, 3)
            high, low = self._evaluate(shifted)[0].view(2, 3, -1)
            normal = F.normalize((low - high).T, dim=-1, eps=1e-8)
        return GeometryOutput(self._activate(values, points), features, normal)

    def density(self, points: Tensor) -> Tensor:
        """(N,) extinction per scene unit at (N, 3) world points."""
        return self._activate(self._evaluate(points, num_outputs=1)[0], points)

    def total_variation(self) -> Tensor:
        """Mean squared difference of neighboring texels, a scalar."""
        horizontal, vertical = (self.planes.diff(dim=dim).square().mean() for dim in (-1, -2))
        return horizontal + vertical

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups ``planes`` and ``decoder``."""
        return [
            {"name": "planes", "params": [self.planes]},
            {"name": "decoder", "params": list(self.decoder.parameters())},
        ]

    def init_from(self, source: GeometryInit, rng: Rng) -> str:
        """Fit the density to the solid bounded by the source's mesh, and the features near its surface."""
        distances = distance_grid(source.mesh, self.radius, 64).to(self.planes)
        near = points_near(source.mesh, 0.05 * self.radius, self.planes)

        def points(generator: torch.Generator, count: int) -> Tensor:
            anywhere = points_in_ball(generator, count // 2, self.radius).to(self.planes)
            return torch.cat([near(generator, count - len(anywhere)), anywhere])

        def masked(points: Tensor, values: Tensor, features: Tensor) -> Tensor:
            close = trilinear(distances, points, self.radius).abs() < 0.05 * self.radius
            return torch.cat([values[:, None], features * close[:, None]], dim=-1)

        def target(points: Tensor) -> Tensor:
            depth = -trilinear(distances, points, self.radius) / self.radius
            features = points.new_zeros(len(points), self.num_features)
            if source.features is not None:
                features = source.features(points)
            return masked(points, (_SLOPE * depth).clamp(_EMPTY, _SOLID), features)

        def predict(points: Tensor) -> Tensor:
            return masked(points, *self._evaluate(points))

        error = fit_features(predict, target, list(self.parameters()), points, rng)
        return f"density and features fitted with an RMS error of {error:.3g} (target density inside: {_SOLID:g})"

    def _evaluate(self, points: Tensor, num_outputs: int | None = None) -> tuple[Tensor, Tensor]:
        """Values before the activation (N,) and features (N, F) at (N, 3) points."""
        unit = points / self.radius
        coordinates = torch.stack([unit[:, [1, 2]], unit[:, [0, 2]], unit[:, [0, 1]]])[:, None]
        sampled = F.grid_sample(self.planes, coordinates, align_corners=True, padding_mode="border")
        outputs = self.decoder(sampled[:, :, 0].sum(dim=0).T, num_outputs=num_outputs)
        blob = 10.0 * (1.0 - unit.norm(dim=-1) / self.config.init_size)
        return outputs[:, 0] + blob, outputs[:, 1:]

    def _activate(self, values: Tensor, points: Tensor) -> Tensor:
        """(N,) densities from values before the activation (N,), 0 outside the ball."""
        return F.softplus(values) * (points.norm(dim=-1) <= self.radius) / self.radius


@register("loss", "plane-variation", summary="Total variation of the planes of a tri-plane.")
class PlaneVariation(Loss):
    """Smoothness of the planes of a :class:`TriPlane`."""

    applies_to = TriPlane

    @dataclass
    class Config(Loss.Config):
        """Options of the plane variation."""

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The unweighted total variation, a scalar."""
        assert isinstance(geometry, TriPlane)
        return geometry.total_variation()
