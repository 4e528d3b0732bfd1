"""A signed distance of a hash grid and a small network, with the extinction of VolSDF (arXiv 2106.12052)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import option
from scoredist3d.geometry.base import GeometryInit, GeometryOutput, SignedDistanceField
from scoredist3d.geometry.hash_field import HashField
from scoredist3d.geometry.sdf_init import ShapeStartConfig
from scoredist3d.geometry.trilinear import distance_grid, trilinear
from scoredist3d.materials.base import Material
from scoredist3d.meshes.sampling import points_near
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "geometry",
    "implicit-sdf",
    summary="Signed distance and features from a hash grid and a small network.",
    arxiv="2106.12052",
)
class ImplicitSDF(HashField, SignedDistanceField):
    """sdf(x) = base(x) + radius f(x); extinction is the Laplace distribution function of -sdf, over beta (VolSDF).

    f is the first output of the network on the encoding of x, zero at the start, so that the object starts as its base:
    a sphere, an ellipsoid or a mesh, whose distances are kept on a grid. With beta the deviation of the surface,
    extinction is (1 / beta) (exp(-sdf / beta) / 2 outside, 1 - exp(sdf / beta) / 2 inside), and beta is learned:
    beta = radius (min_beta + exp(b)).
    """

    @dataclass
    class Config(ShapeStartConfig, HashField.Config):
        """Options of the signed distance."""

        shape_init_resolution: int = option(
            64, "Samples per axis of the distances to a mesh that the object starts from.", ge=8, le=256
        )
        beta: float = option(
            0.05, "Deviation of the surface at the start, as a fraction of the radius; smaller is sharper.", gt=0
        )
        min_beta: float = option(0.003, "Least deviation that can be learned, as a fraction of the radius.", gt=0)
        normal: Literal["analytic", "finite-difference"] = option(
            "finite-difference",
            "How normals are computed; finite differences look further and so are smoother, but cost more.",
        )

        def validate(self) -> list[str]:
            """Beta must be able to move."""
            problems = super().validate()
            if self.beta <= self.min_beta:
                problems.append(f"beta: must be more than min_beta = {self.min_beta}, got {self.beta}")
            return problems

    config: Config
    outward_sign = 1.0
    base_grid: Tensor
    uses_grid: Tensor

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config, rng=rng, material=material)
        with torch.no_grad():
            self.network.weights[-1][0].zero_()
        self.log_beta = nn.Parameter(torch.tensor(math.log(config.beta - config.min_beta)))
        resolution = config.shape_init_resolution
        self.register_buffer("base_grid", torch.zeros(resolution, resolution, resolution))
        self.register_buffer("uses_grid", torch.zeros((), dtype=torch.bool))
        self._on_grid = False  # uses_grid, known without asking the device
        self.register_load_state_dict_post_hook(_look_at_base)
        mesh = config.start_mesh(self.radius)
        if mesh is not None:
            self._set_base(distance_grid(mesh, self.radius, resolution))

    @property
    def beta(self) -> Tensor:
        """Deviation of the surface, scene units."""
        return self.radius * (self.config.min_beta + self.log_beta.exp())

    def sdf(self, points: Tensor) -> Tensor:
        """(N,) signed distances at (N, 3) world points, negative inside, scene units."""
        return self._value_at(points, points.norm(dim=-1) / self.radius)

    def sdf_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) gradients of :meth:`sdf`, computed as the option ``normal`` says."""
        if self.config.normal == "analytic":
            return self._analytic_gradient(points)
        return self._finite_difference_gradient(points)

    def extinction(self, points: Tensor) -> Tensor:
        """(N,) at (N, 3), per scene unit, 0 outside the ball."""
        distance = points.norm(dim=-1) / self.radius
        return self._extinction(self._value_at(points, distance), distance)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``encoding``, ``network`` and, where it is learned, ``beta``."""
        learned = [{"name": "beta", "params": [self.log_beta]}] if self.log_beta.requires_grad else []
        return [*super().parameter_groups(), *learned]

    def freeze_extinction(self) -> None:
        """Beta is not learned."""
        self.log_beta.requires_grad_(False)

    def init_from(self, start: GeometryInit, rng: Rng) -> str:
        """The mesh becomes the base, f starts again at zero, and the features are fitted near the surface."""
        self._set_base(distance_grid(start.mesh, self.radius, self.config.shape_init_resolution))
        last = len(self.network.weights) - 1
        weight, bias = self.network.weights[last], self.network.biases[last]
        with torch.no_grad():
            weight[0].zero_()
            bias[0].zero_()
        if start.features is None:
            return "signed distance taken from the mesh"

        def features(points: Tensor) -> Tensor:
            return self._evaluate(points, points.norm(dim=-1) / self.radius)[1]

        near = points_near(start.mesh, 0.02 * self.radius, self.table)
        # Only the features enter the error, so the distance's row of weights gets no gradient and stays zero.
        error = self._fit(features, start.features, near, rng)
        return f"signed distance taken from the mesh, features fitted to it, {error:.3g} off on average"

    def _value(self, raw: Tensor, points: Tensor, distance: Tensor) -> Tensor:
        """base(x) + radius f(x)."""
        return self._base(points) + self.radius * raw

    def _output(self, value: Tensor, features: Tensor, gradient: Tensor | None, distance: Tensor) -> GeometryOutput:
        return GeometryOutput(self._extinction(value, distance), features, self._outward(gradient), value, gradient)

    def _base(self, points: Tensor) -> Tensor:
        """What the object starts as: signed distances (N,)."""
        if self._on_grid:
            return trilinear(self.base_grid, points, self.radius)
        return self.config.start_distance(points, self.radius)

    def _extinction(self, sdf: Tensor, distance: Tensor) -> Tensor:
        beta = self.beta
        tail = 0.5 * torch.exp(-sdf.abs() / beta)
        share = torch.where(sdf > 0, tail, 1.0 - tail)
        return share * ((distance <= 1.0).to(share.dtype) / beta)

    def _set_base(self, distances: Tensor) -> None:
        with torch.no_grad():
            self.base_grid.copy_(distances)
            self.uses_grid.fill_(True)
        self._on_grid = True


def _look_at_base(geometry: Any, _: Any) -> None:
    geometry._on_grid = bool(geometry.uses_grid)
