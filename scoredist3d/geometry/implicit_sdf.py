"""Signed distance field from a hash grid and a small network, with the extinction of VolSDF (arXiv 2106.12052)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import option
from scoredist3d.geometry.base import GeometryInit, GeometryOutput, SignedDistanceField
from scoredist3d.geometry.hash_field import HashField
from scoredist3d.geometry.sdf_init import SDFInitConfig
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
    """Signed distance sdf(x) = base(x) + radius f(x), with the extinction of VolSDF.

    f is the network's first output, initially zero, so that the object starts as the base: a sphere, an ellipsoid, or a
    mesh, whose distances are stored on a grid. Extinction is the cumulative distribution function of a Laplace
    distribution with scale beta, divided by beta: exp(-sdf / beta) / (2 beta) outside and
    (1 - exp(sdf / beta) / 2) / beta inside. beta = radius (min_beta + exp(b)) with a learned b.

    Attributes:
        base_grid: (G, G, G), signed distances of the base mesh, scene units.
        uses_grid: (), bool, whether the base is ``base_grid`` instead of the sphere or ellipsoid of the config.
    """

    @dataclass
    class Config(SDFInitConfig, HashField.Config):
        """Options of the implicit SDF."""

        shape_init_resolution: int = option(
            64, "Number of vertices per axis of the grid that stores the distances to an initial mesh.", ge=8, le=256
        )
        beta: float = option(
            0.05,
            "Initial scale of the Laplace distribution, as a fraction of the radius; smaller is sharper.",
            gt=0,
        )
        min_beta: float = option(0.003, "Minimum scale of the Laplace distribution, as a fraction of the radius.", gt=0)
        normal: Literal["analytic", "finite-difference"] = option(
            "finite-difference",
            "How normals are computed; finite differences give smoother normals but cost more.",
        )

        def validate(self) -> list[str]:
            """Require ``beta`` to exceed ``min_beta``."""
            problems = super().validate()
            if self.beta <= self.min_beta:
                problems.append(f"beta: must be larger than min_beta = {self.min_beta}, got {self.beta}")
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
        self._on_grid = False  # host copy of uses_grid, which avoids a synchronization
        self.register_load_state_dict_post_hook(_update_base_flag)
        mesh = config.initial_mesh(self.radius)
        if mesh is not None:
            self._set_base(distance_grid(mesh, self.radius, resolution))

    @property
    def beta(self) -> Tensor:
        """Scale of the Laplace distribution, scene units."""
        return self.radius * (self.config.min_beta + self.log_beta.exp())

    def sdf(self, points: Tensor) -> Tensor:
        """(N,) signed distances at (N, 3) world points, negative inside, scene units."""
        return self._value_at(points, points.norm(dim=-1) / self.radius)

    def sdf_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) gradients of :meth:`sdf`, computed with the method that the option ``normal`` selects."""
        if self.config.normal == "analytic":
            return self._analytic_gradient(points)
        return self._finite_difference_gradient(points)

    def extinction(self, points: Tensor) -> Tensor:
        """(N,) extinction per scene unit at (N, 3) world points, 0 outside the ball."""
        distance = points.norm(dim=-1) / self.radius
        return self._extinction(self._value_at(points, distance), distance)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups ``encoding`` and ``network``, and ``beta`` unless it is frozen."""
        learned = [{"name": "beta", "params": [self.log_beta]}] if self.log_beta.requires_grad else []
        return [*super().parameter_groups(), *learned]

    def freeze_extinction(self) -> None:
        """Freeze beta, the scale of the Laplace distribution."""
        self.log_beta.requires_grad_(False)

    def init_from(self, source: GeometryInit, rng: Rng) -> str:
        """Set the base to the source's mesh and f to zero, and fit the features near the surface."""
        self._set_base(distance_grid(source.mesh, self.radius, self.config.shape_init_resolution))
        last = len(self.network.weights) - 1
        weight, bias = self.network.weights[last], self.network.biases[last]
        with torch.no_grad():
            weight[0].zero_()
            bias[0].zero_()
        if source.features is None:
            return "signed distances computed from the mesh"

        def features(points: Tensor) -> Tensor:
            return self._evaluate(points, points.norm(dim=-1) / self.radius)[1]

        near = points_near(source.mesh, 0.02 * self.radius, self.table)
        # Only the features enter the error, so the weights of f receive no gradient and stay zero.
        error = self._fit(features, source.features, near, rng)
        return f"signed distances computed from the mesh; features fitted with an RMS error of {error:.3g}"

    def _value(self, raw: Tensor, points: Tensor, distance: Tensor) -> Tensor:
        """base(x) + radius f(x)."""
        return self._base(points) + self.radius * raw

    def _output(self, value: Tensor, features: Tensor, gradient: Tensor | None, distance: Tensor) -> GeometryOutput:
        """Extinction, features, and signed distance with its gradient."""
        return GeometryOutput(self._extinction(value, distance), features, self._outward(gradient), value, gradient)

    def _base(self, points: Tensor) -> Tensor:
        """(N,) signed distances from (N, 3) points to the base."""
        if self._on_grid:
            return trilinear(self.base_grid, points, self.radius)
        return self.config.initial_distance(points, self.radius)

    def _extinction(self, sdf: Tensor, distance: Tensor) -> Tensor:
        """(N,) extinction at signed distances (N,), where ``distance`` (N,) is |x| / radius."""
        beta = self.beta
        tail = 0.5 * torch.exp(-sdf.abs() / beta)
        share = torch.where(sdf > 0, tail, 1.0 - tail)
        return share * ((distance <= 1.0).to(share.dtype) / beta)

    def _set_base(self, distances: Tensor) -> None:
        """Store signed distances (G, G, G) on the grid and use them as the base."""
        with torch.no_grad():
            self.base_grid.copy_(distances)
            self.uses_grid.fill_(True)
        self._on_grid = True


def _update_base_flag(geometry: Any, _: Any) -> None:
    """Update the host copy of ``uses_grid`` after loading a state."""
    geometry._on_grid = bool(geometry.uses_grid)
