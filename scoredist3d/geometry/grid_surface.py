"""What surfaces extracted from signed distances on a grid share."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import FieldError, option
from scoredist3d.geometry.base import GeometryInit, Surface, SurfaceMesh, SurfacePoints
from scoredist3d.geometry.mesh_queries import density_of, distance_to, to_mesh
from scoredist3d.geometry.sdf_init import ShapeStartConfig
from scoredist3d.geometry.texture_field import PointField
from scoredist3d.materials.base import Material
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.nn.hash_network import FREE_OPTIONS, HashGridConfig, NetworkConfig, grid_problems
from scoredist3d.nn.regression import points_near
from scoredist3d.seeding import Rng

logger = logging.getLogger(__name__)

# Distances of a start are cut here, in grid spacings: an optimiser's steps then reach every sign in sensible time.
_TRUNCATION = 4.0
# Vertices move by less than half a spacing, so that no cell can turn over.
_REACH = 0.49


class GridSurface(Surface):
    """The surface s = 0 of signed distances s at the vertices of a grid, which may move a little.

    Vertex i is at x_i + 0.49 h tanh(d_i), h the grid's spacing, d_i a parameter. The distance there is a parameter
    itself or, with ``sdf_source: network``, the starting shape's distance plus radius * f(x_i), f a hash grid and a
    network (Fantasia3D, arXiv 2303.13873, takes a network too). It is never less than |x_i| - radius, so that the
    surface is closed and inside the ball. Features come from another hash grid and network at the surface's points.
    """

    # The start is in the state.
    free_options = FREE_OPTIONS | {
        "shape_init",
        "shape_init_size",
        "shape_init_axes",
        "shape_init_mesh",
        "fix_geometry",
        "fix_texture",
    }

    @dataclass
    class Config(ShapeStartConfig, Surface.Config):
        """Options of surfaces on grids."""

        num_features: int | None = option(
            None, "Feature channels handed to the material; as many as it takes where not given.", ge=1
        )
        resolution: int = option(64, "Grid steps along each side of the cube around the ball, an even number.", ge=8)
        sdf_source: Literal["vertices", "network"] = option(
            "vertices", "Each grid vertex has its own distance, or a hash grid and a network give all of them."
        )
        grid: HashGridConfig = field(
            default_factory=HashGridConfig,
            metadata={"help": "The encoding of the features, and of sdf_source: network."},
        )
        network: NetworkConfig = field(default_factory=NetworkConfig, metadata={"help": "The networks after it."})
        fix_geometry: bool = option(False, "Keep the surface as it is and train the features alone.")
        fix_texture: bool = option(False, "Keep the features as they are and train the surface alone.")

        def validate(self) -> list[str]:
            """Relations between the options."""
            problems = super().validate() + grid_problems(self.grid)
            if self.resolution % 2 or self.resolution > 256:
                problems.append(f"resolution: must be an even number up to 256, got {self.resolution}")
            if self.fix_geometry and self.fix_texture:
                problems.append("fix_texture: together with fix_geometry nothing is left to train; set one to false")
            return problems

    iso_level = 1.0
    spacing: float
    vertices: Tensor
    initial_sdf: Tensor
    border: Tensor
    reach: Tensor

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = config.num_features or (3 if material is None else material.num_features)
        vertices, self.spacing = self.grid_vertices()
        border = vertices.norm(dim=-1) - self.radius
        for name, values in (("vertices", vertices), ("border", border), ("reach", self._reach_of(border))):
            self.register_buffer(name, values, persistent=False)
        sdf = self._initial_sdf(vertices)
        generator = (rng or Rng()).shared()("geometry")
        self.texture = self._point_field(self.num_features, generator)
        if config.sdf_source == "vertices":
            self.sdf = nn.Parameter(sdf)
        else:
            self.register_buffer("initial_sdf", sdf)
            self.sdf_network = self._point_field(1, generator)
            self.sdf_network.set_zero()
        self.deform = nn.Parameter(torch.zeros_like(vertices))
        for parameter in GridSurface.shape_parameters(self):  # those of subclasses do not exist yet
            parameter.requires_grad_(not config.fix_geometry)
        self.texture.requires_grad_(not config.fix_texture)
        self._kept: tuple[tuple[Any, ...], SurfaceMesh] | None = None
        self._was_empty = False

    @abstractmethod
    def grid_vertices(self) -> tuple[Tensor, float]:
        """(V, 3) world positions of the grid's vertices, and their spacing along an axis."""

    @abstractmethod
    def extract(self, positions: Tensor, sdf: Tensor) -> SurfaceMesh:
        """The surface of distances (V,) at (V, 3)."""

    @abstractmethod
    def grid_edges(self) -> Tensor:
        """(E, 2) int32, the grid's edges as ids of vertices, each once, on the geometry's device."""

    def signed_distances(self) -> Tensor:
        """(V,) at the grid's vertices, negative inside, scene units; differentiable in the parameters."""
        if self.config.sdf_source == "vertices":
            return torch.maximum(self.sdf, self.border)
        offset = self.sdf_network(self.vertices)[:, 0]
        return torch.maximum(self.initial_sdf + self.radius * offset, self.border)

    def shape_parameters(self) -> list[nn.Parameter]:
        """The parameters that the surface depends on."""
        return [*self._sdf_parameters(), self.deform]

    def forward(self) -> SurfaceMesh:
        """The mesh at the current parameters; the very same one at every step where the geometry is fixed."""
        return self._constant() if self.config.fix_geometry else self._extracted()

    def features(self, points: SurfacePoints) -> Tensor:
        """(N, F) of the texture's field."""
        return self.features_at(points.points)

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) at (N, 3)."""
        features: Tensor = self.texture(points)
        return features

    def density(self, points: Tensor) -> Tensor:
        """(N,) exp(-sdf / (0.01 radius)) with the signed distance of the mesh."""
        return density_of(to_mesh(self._constant()), points, self.radius)

    def surface(self) -> Mesh:
        """The mesh."""
        return to_mesh(self._constant())

    def init_from(self, start: GeometryInit, rng: Rng) -> str:
        """Signed distances of the start's mesh, no deformation, features by regression near the surface.

        Raises:
            ValueError: The start has no faces, or nothing of it is in the ball.
        """
        if not len(start.mesh.faces):
            raise FieldError("cannot start from a mesh without faces")
        limit = _TRUNCATION * self.spacing
        with torch.no_grad():
            self.set_distances(distance_to(start.mesh, self.vertices).clamp(-limit, limit))
            mesh = self._constant()
        if not len(mesh.faces):
            raise FieldError(
                f"a grid of {self.config.resolution} steps holds nothing of the mesh to start "
                "from; raise it, or check that the mesh is in the ball of geometry.radius",
                "resolution",
            )
        error = float(distance_to(start.mesh, mesh.vertices).abs().mean())
        said = f"{len(mesh.faces):,} faces from the grid, on average {error:.2g} from the start's surface"
        if start.features is None:
            return said
        near = points_near(start.mesh, 0.5 * self.spacing, self.vertices)
        return f"{said}; features fitted to it, {self.texture.fit(start.features, near, rng):.2g} off on average"

    def update_step(self, step: int) -> None:
        """Coarse to fine in the encodings."""
        self.texture.update_step(step)
        if self.config.sdf_source == "network":
            self.sdf_network.update_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``sdf``, ``deform``, and the texture's ``encoding`` and ``network``; what is fixed has no gradient."""
        return [
            {"name": "sdf", "params": self._sdf_parameters()},
            {"name": "deform", "params": [self.deform]},
            {"name": "encoding", "params": [self.texture.table]},
            {"name": "network", "params": list(self.texture.network.parameters())},
        ]

    def _sdf_parameters(self) -> list[nn.Parameter]:
        return [self.sdf] if self.config.sdf_source == "vertices" else list(self.sdf_network.parameters())

    def set_distances(self, sdf: Tensor) -> None:
        """Make the distances at the grid's vertices ``sdf`` (V,), and undo what else has been learnt of the shape."""
        self.deform.zero_()
        if self.config.sdf_source == "vertices":
            self.sdf.copy_(sdf)
        else:
            self.sdf_network.set_zero()
            self.initial_sdf.copy_(sdf)

    def _extracted(self) -> SurfaceMesh:
        positions = self.vertices + self.reach[:, None] * self.deform.tanh()
        mesh = self.extract(positions, self.signed_distances())
        if not len(mesh.faces) and not self._was_empty:
            logger.warning(
                "the surface has vanished: no signed distance on the grid of %d steps is negative, so renders show the "
                "background alone; lower the learning rates of geometry.sdf and geometry.deform, or the weight of the "
                "losses that shrink the object",
                self.config.resolution,
            )
        self._was_empty = not len(mesh.faces)
        return mesh

    @torch.no_grad()
    def _constant(self) -> SurfaceMesh:
        """The mesh without gradients, kept until a parameter changes."""
        state = [*self.shape_parameters(), *([self.initial_sdf] if self.config.sdf_source == "network" else [])]
        levels = self.sdf_network.num_active_levels if self.config.sdf_source == "network" else 0
        seen = (levels, *((tensor.data_ptr(), tensor._version) for tensor in state))
        if self._kept is None or self._kept[0] != seen:
            mesh = self._extracted()
            self._kept = seen, SurfaceMesh(mesh.vertices, mesh.faces, fixed_topology=self.config.fix_geometry)
        return self._kept[1]

    def _reach_of(self, border: Tensor) -> Tensor:
        """(V,) how far each vertex may move: not at all where an edge (two spacings at most) can cross the border."""
        return torch.where(border < -2 * self.spacing, _REACH * self.spacing, 0.0)

    def _point_field(self, num_outputs: int, generator: torch.Generator) -> PointField:
        return PointField(
            self.config.grid,
            self.config.network,
            num_outputs=num_outputs,
            radius=self.radius,
            generator=generator,
        )

    def _initial_sdf(self, vertices: Tensor) -> Tensor:
        mesh = self.config.start_mesh(self.radius)
        return self.config.start_distance(vertices, self.radius) if mesh is None else distance_to(mesh, vertices)
