"""A density volume: multiresolution hash grid followed by a small network (Instant-NGP, arXiv 2201.05989)."""

from __future__ import annotations

import math
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
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

# exp(15) = 3.3e6 per radius is opaque within a millionth of the radius; beyond it exp is continued linearly.
_MAX_EXPONENT = 15.0
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


@register(
    "geometry",
    "implicit-volume",
    summary="Density and features from a hash grid and a small network.",
    arxiv="2201.05989",
)
class ImplicitVolume(Field):
    """Density tau(x) = act(f(x) + b(x)) / radius inside the ball, 0 outside; features are the network's other outputs.

    f is the first output of the network on the encoding of x, b the blob that starts the optimisation with something in
    the middle: with u = |x| / radius and strength lambda, ``blob_dreamfusion`` is lambda exp(-u^2 / (2 s^2))
    (DreamFusion, appendix) and ``blob_magic3d`` is lambda (1 - u / s) (Magic3D). Dividing by the radius makes optical
    depth, and so every other option, independent of the scene's scale.
    """

    @dataclass
    class Config(Field.Config):
        """Options of the implicit volume."""

        num_features: int | None = option(
            None, "Feature channels handed to the material; as many as it takes where not given.", ge=1
        )
        grid: HashGridConfig = field(default_factory=HashGridConfig, metadata={"help": "The encoding."})
        network: NetworkConfig = field(default_factory=NetworkConfig, metadata={"help": "The network after it."})
        density_activation: Literal["softplus", "trunc-exp"] = option(
            "softplus", "Map to a non-negative density; trunc-exp is exp, continued linearly where it is huge."
        )
        density_blob: Literal["blob_magic3d", "blob_dreamfusion", "none"] = option(
            "blob_magic3d", "Density added before the activation so that optimisation starts from a ball."
        )
        density_blob_strength: float = option(10.0, "lambda: height of the blob before the activation.")
        density_blob_size: float = option(
            0.5,
            "s: where the magic3d blob crosses zero, or the dreamfusion blob's deviation; fraction of the radius.",
            gt=0,
        )
        normal: Literal["analytic", "finite-difference"] = option(
            "analytic", "How normals are computed; finite differences look further and so are smoother, but cost more."
        )
        finite_difference_step: float = option(
            0.01, "Offset of the finite-difference samples, as a fraction of the radius.", gt=0
        )

        def validate(self) -> list[str]:
            """Relations between grid options."""
            problems = super().validate()
            levels, start_level = self.grid.num_levels, self.grid.coarse_to_fine.start_level
            if start_level is not None and start_level > levels:
                problems.append(
                    f"grid.coarse_to_fine.start_level: must be at most grid.num_levels = {levels}, got {start_level}"
                )
            if self.grid.max_resolution is not None and self.grid.max_resolution < self.grid.base_resolution:
                problems.append(
                    f"grid.max_resolution: must be at least grid.base_resolution = {self.grid.base_resolution}, "
                    f"got {self.grid.max_resolution}"
                )
            return problems

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

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """The field at (N, 3) world points; differentiable in the parameters, and in the points where they need it."""
        if with_normal and self.config.normal == "analytic":
            return self._with_analytic_normal(points)
        distance = points.norm(dim=-1) / self.radius
        raw, features = self._evaluate(points, distance)
        normal = self._finite_difference_normal(points) if with_normal else None
        return GeometryOutput(self._activate(raw, distance), features, normal)

    def density(self, points: Tensor) -> Tensor:
        """(N,) densities at (N, 3) world points."""
        distance = points.norm(dim=-1) / self.radius
        return self._activate(self._raw_density(points, distance), distance)

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
        """f(x) + b(x) (N,) and features (N, F)."""
        encoding = self._encode(points, twice_differentiable=twice_differentiable)
        raw, features = self.network(encoding).split([1, self.num_features], dim=-1)
        return raw[:, 0] + self._blob(distance), features

    def _raw_density(self, points: Tensor, distance: Tensor) -> Tensor:
        """f(x) + b(x) (N,)."""
        return self.network(self._encode(points), num_outputs=1)[:, 0] + self._blob(distance)

    def _blob(self, distance: Tensor) -> Tensor | float:
        """b(x) at ``distance`` = |x| / radius."""
        strength, size = self.config.density_blob_strength, self.config.density_blob_size
        if self.config.density_blob == "blob_magic3d":
            return strength - (strength / size) * distance
        if self.config.density_blob == "blob_dreamfusion":
            return strength * torch.exp(distance.square() * (-0.5 / size**2))
        return 0.0

    def _activate(self, raw: Tensor, distance: Tensor) -> Tensor:
        density = F.softplus(raw) if self.config.density_activation == "softplus" else _truncated_exp(raw)
        return density * ((distance <= 1.0).to(density.dtype) / self.radius)

    def _with_analytic_normal(self, points: Tensor) -> GeometryOutput:
        """n = -grad tau / |grad tau|; tau is increasing in f + b, whose gradient has the same direction."""
        build_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_()
            distance = points.norm(dim=-1) / self.radius
            raw, features = self._evaluate(points, distance, twice_differentiable=True)
            (gradient,) = torch.autograd.grad(raw.sum(), points, create_graph=build_graph, retain_graph=True)
            density = self._activate(raw, distance)
        if not build_graph:
            density, features = density.detach(), features.detach()
        return GeometryOutput(density, features, _outward(gradient))

    def _finite_difference_normal(self, points: Tensor) -> Tensor:
        """n from four samples at the corners k of a tetrahedron: grad (f + b) ~ sum_k k (f + b)(x + h k) / (4 h)."""
        corners = points.new_tensor(_TETRAHEDRON)
        step = self.config.finite_difference_step * self.radius / math.sqrt(3.0)
        shifted = (points[None] + step * corners[:, None]).reshape(-1, 3)
        raw = self._raw_density(shifted, shifted.norm(dim=-1) / self.radius).view(4, -1)
        return _outward((corners.T @ raw).T)


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


def _truncated_exp(x: Tensor) -> Tensor:
    """exp(x), continued by its tangent beyond x = 15: a runaway density keeps finite values and gradients."""
    linear = (x - _MAX_EXPONENT).clamp_min(0.0)
    return x.clamp_max(_MAX_EXPONENT).exp() * (1.0 + linear)


def _outward(gradient: Tensor) -> Tensor:
    """-gradient / |gradient|, and zero where the field is flat."""
    return F.normalize(-gradient, dim=-1, eps=1e-8)
