"""What fields of a multiresolution hash grid and a small network share (Instant-NGP, arXiv 2201.05989)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoredist3d.config import option
from scoredist3d.geometry.base import Field, GeometryOutput
from scoredist3d.geometry.networks import MLP
from scoredist3d.materials.base import Material
from scoredist3d.ops.hash_grid import HashGridSpec, hash_grid_encode
from scoredist3d.seeding import Rng

_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, 1.0))


@dataclass
class CoarseToFineConfig:
    """Levels switched on while training; the finer ones give zeros until then."""

    start_level: int | None = option(None, "Levels active at first; all of them where not given.", ge=1)
    start_step: int = option(0, "Step from which levels are added.", ge=0)
    every: int = option(100, "Steps between two added levels.", ge=1)


@dataclass
class HashGridConfig:
    """Multiresolution hash grid over the cube around the ball."""

    num_levels: int = option(8, "Resolution levels.", ge=1, le=32)
    features_per_level: Literal[1, 2, 4, 8] = option(2, "Features stored per grid vertex and level.")
    log2_hashmap_size: int = option(
        14, "log2 of the entries per level; finer levels share entries by hashing.", ge=4, le=24
    )
    base_resolution: int = option(8, "Vertices per axis of the coarsest level.", ge=2)
    per_level_scale: float = option(1.5, "Growth of the resolution from level to level.", ge=1)
    max_resolution: int | None = option(
        None, "Vertices per axis of the finest level; replaces per_level_scale where given.", ge=2
    )
    initial_range: float = option(1e-4, "Entries start uniformly in [-initial_range, initial_range].", gt=0)
    coarse_to_fine: CoarseToFineConfig = field(
        default_factory=CoarseToFineConfig, metadata={"help": "Levels that are switched on while training."}
    )
    backend: Literal["auto", "torch", "native", "triton", "tinycudann"] = option(
        "auto", "Implementation of the encoding; analytic normals take auto where this is tinycudann."
    )


@dataclass
class NetworkConfig:
    """The network that maps the encoding to density and features."""

    hidden_width: int = option(32, "Units per hidden layer.", ge=1)
    hidden_layers: int = option(1, "Hidden layers; 0 is a linear map.", ge=0, le=8)


class HashField(Field):
    """Value and features of points: the outputs of a network on the hash encoding of the point.

    The first output f is combined with something known, :meth:`_value`; the value's gradient is the normal, up to
    ``outward_sign``. What the value means is said by the kinds of field, in :meth:`_output`.

    Attributes:
        outward_sign: 1 where the value grows outwards, -1 where it grows inwards.
    """

    @dataclass
    class Config(Field.Config):
        """Options of every hash-grid field."""

        num_features: int | None = option(
            None, "Feature channels handed to the material; as many as it takes where not given.", ge=1
        )
        grid: HashGridConfig = field(default_factory=HashGridConfig, metadata={"help": "The encoding."})
        network: NetworkConfig = field(default_factory=NetworkConfig, metadata={"help": "The network after it."})
        normal: Literal["analytic", "finite-difference"] = option(
            "analytic", "How normals are computed; finite differences look further and so are smoother, but cost more."
        )
        finite_difference_step: float = option(
            0.01, "Offset of the finite-difference samples, as a fraction of the radius.", gt=0
        )

        def validate(self) -> list[str]:
            """Relations between grid options."""
            return super().validate() + grid_problems(self.grid)

    outward_sign: float

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = config.num_features or (3 if material is None else material.num_features)
        self.spec = grid_spec(config.grid)
        generator = (rng or Rng()).shared()("geometry")
        bound = config.grid.initial_range
        table = torch.empty(self.spec.num_entries, config.grid.features_per_level)
        self.table = nn.Parameter(table.uniform_(-bound, bound, generator=generator))
        hidden = [config.network.hidden_width] * config.network.hidden_layers
        self.network = MLP([self.spec.output_dim, *hidden, 1 + self.num_features], generator)
        self.num_active_levels = self._active_levels(0)

    @abstractmethod
    def _value(self, raw: Tensor, points: Tensor, distance: Tensor) -> Tensor:
        """(N,) the value, from f = ``raw`` (N,) and what is known at ``points`` (N, 3), |x| / radius away."""

    @abstractmethod
    def _output(self, value: Tensor, features: Tensor, normal: Tensor | None, distance: Tensor) -> GeometryOutput:
        """What renderers take, from the values (N,)."""

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """The field at (N, 3) world points; differentiable in the parameters, and in the points where they need it."""
        if with_normal and self.config.normal == "analytic":
            return self._with_analytic_normal(points)
        distance = points.norm(dim=-1) / self.radius
        value, features = self._evaluate(points, distance)
        normal = self._outward(self._finite_difference_gradient(points)) if with_normal else None
        return self._output(value, features, normal, distance)

    def update_step(self, step: int) -> None:
        """Coarse to fine: switch on the levels due at ``step``."""
        self.num_active_levels = self._active_levels(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The hash table (``encoding``) and the network's weights (``network``)."""
        return [
            {"name": "encoding", "params": [self.table]},
            {"name": "network", "params": list(self.network.parameters())},
        ]

    def _active_levels(self, step: int) -> int:
        schedule = self.config.grid.coarse_to_fine
        if schedule.start_level is None:
            return self.spec.num_levels
        return min(self.spec.num_levels, schedule.start_level + max(0, step - schedule.start_step) // schedule.every)

    def _encode(self, points: Tensor, *, twice_differentiable: bool = False) -> Tensor:
        """Encoding of (N, 3) world points: the cube around the ball is the grid's [0, 1]^3."""
        unit = 0.5 + (0.5 / self.radius) * points
        backend: str = self.config.grid.backend
        if twice_differentiable and backend == "tinycudann":
            backend = "auto"
        return hash_grid_encode(unit, self.table, self.spec, backend=backend, num_active_levels=self.num_active_levels)

    def _evaluate(
        self, points: Tensor, distance: Tensor, *, twice_differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Values (N,) and features (N, F)."""
        encoding = self._encode(points, twice_differentiable=twice_differentiable)
        raw, features = self.network(encoding).split([1, self.num_features], dim=-1)
        return self._value(raw[:, 0], points, distance), features

    def _value_at(self, points: Tensor, distance: Tensor, *, twice_differentiable: bool = False) -> Tensor:
        """Values (N,) alone."""
        encoding = self._encode(points, twice_differentiable=twice_differentiable)
        return self._value(self.network(encoding, num_outputs=1)[:, 0], points, distance)

    def _with_analytic_normal(self, points: Tensor) -> GeometryOutput:
        """The normal is the gradient's direction; a density grows with its value, so that this serves there too."""
        build_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_()
            distance = points.norm(dim=-1) / self.radius
            value, features = self._evaluate(points, distance, twice_differentiable=True)
            (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=build_graph, retain_graph=True)
        if not build_graph:
            value, features, distance = value.detach(), features.detach(), distance.detach()
        return self._output(value, features, self._outward(gradient), distance)

    def _analytic_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) gradients of the value."""
        build_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_()
            value = self._value_at(points, points.norm(dim=-1) / self.radius, twice_differentiable=True)
            (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=build_graph)
        return gradient

    def _finite_difference_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) from four samples at the corners k of a tetrahedron: grad v ~ sum_k k v(x + h k) / (4 h)."""
        corners = points.new_tensor(_TETRAHEDRON)
        step = self.config.finite_difference_step * self.radius / math.sqrt(3.0)
        shifted = (points[None] + step * corners[:, None]).reshape(-1, 3)
        value = self._value_at(shifted, shifted.norm(dim=-1) / self.radius).view(4, -1)
        return (corners.T @ value).T / (4.0 * step)

    def _outward(self, gradient: Tensor) -> Tensor:
        """Unit normals, and zero where the field is flat."""
        return F.normalize(self.outward_sign * gradient, dim=-1, eps=1e-8)


def grid_problems(grid: HashGridConfig) -> list[str]:
    """What is wrong with the relations between a ``grid`` block's options."""
    problems = []
    levels, start_level = grid.num_levels, grid.coarse_to_fine.start_level
    if start_level is not None and start_level > levels:
        problems.append(
            f"grid.coarse_to_fine.start_level: must be at most grid.num_levels = {levels}, got {start_level}"
        )
    if grid.max_resolution is not None and grid.max_resolution < grid.base_resolution:
        problems.append(
            f"grid.max_resolution: must be at least grid.base_resolution = {grid.base_resolution}, "
            f"got {grid.max_resolution}"
        )
    return problems


def grid_spec(config: HashGridConfig) -> HashGridSpec:
    """The grid's layout; ``max_resolution`` = base_resolution * scale^(num_levels - 1) fixes the scale where given."""
    scale = config.per_level_scale
    if config.max_resolution is not None and config.num_levels > 1:
        scale = (config.max_resolution / config.base_resolution) ** (1.0 / (config.num_levels - 1))
    return HashGridSpec(
        num_levels=config.num_levels,
        features_per_level=config.features_per_level,
        log2_hashmap_size=config.log2_hashmap_size,
        base_resolution=config.base_resolution,
        per_level_scale=scale,
    )
