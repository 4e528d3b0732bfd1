"""Base class for surfaces that are extracted from signed distances on a grid."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import FieldError, Schedule, option
from scoredist3d.geometry.base import GeometryInit, Surface, SurfaceMesh, SurfacePoints
from scoredist3d.geometry.mesh_queries import density_of, distance_to
from scoredist3d.geometry.sdf_init import SDFInitConfig
from scoredist3d.geometry.smoothed_gradient import VertexLattice, smooth_gradient
from scoredist3d.geometry.texture_field import PointField
from scoredist3d.limits import MAX_FEATURES, MAX_GRID_RESOLUTION
from scoredist3d.materials.base import Material
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.sampling import points_near
from scoredist3d.meshes.space_carving import DepthEstimates, carved, carving_evidence
from scoredist3d.nn.hash_network import FREE_OPTIONS, HashGridConfig, NetworkConfig, grid_problems
from scoredist3d.seeding import Rng

logger = logging.getLogger(__name__)

# Vertices move by less than half a spacing, so that no cell can invert.
_MAX_OFFSET = 0.49
_LEAST_LEFT = 0.05  # share of the vertices inside that remain after carving


class GridSurface(Surface):
    """The zero level set of signed distances at the vertices of a deformable grid.

    Vertex i is at x_i + 0.49 h tanh(d_i), where h is the grid's spacing and d_i a parameter. Its signed distance is a
    parameter or, with ``sdf_source: network``, the distance to the initial shape plus radius * f(x_i), where f is a
    hash grid with a network (as in Fantasia3D, arXiv 2303.13873). Distances are at least |x_i| - radius, which keeps
    the surface closed and inside the ball. A second hash grid with a network gives the features at surface points.

    Attributes:
        spacing: h, scene units.
        vertices: (V, 3), undeformed vertices, world.
        border: (V,), |x_i| - radius.
        reach: (V,), maximum displacement of each vertex, scene units.
        initial_sdf: (V,), signed distances to the initial shape; only with ``sdf_source: network``.
    """

    # These options affect only the initial shape, which is part of the state, and the choice of trained parameters.
    free_options = FREE_OPTIONS | {
        "shape_init",
        "shape_init_size",
        "shape_init_axes",
        "shape_init_mesh",
        "fix_geometry",
        "fix_texture",
    }

    @dataclass
    class Config(SDFInitConfig, Surface.Config):
        """Options shared by all grid surfaces."""

        num_features: int | None = option(
            None, "Number of feature channels; null uses the number that the material requires.", ge=1, le=MAX_FEATURES
        )
        resolution: int = option(
            64,
            "Number of grid cells along each side of the cube around the ball; must be even.",
            ge=8,
            le=MAX_GRID_RESOLUTION,
        )
        sdf_source: Literal["vertices", "network"] = option(
            "vertices", "Source of the signed distances: one parameter per grid vertex, or a hash grid with a network."
        )
        grid: HashGridConfig = field(
            default_factory=HashGridConfig,
            metadata={"help": "Hash grid for the features, and for sdf_source: network."},
        )
        network: NetworkConfig = field(
            default_factory=NetworkConfig, metadata={"help": "Network after each hash grid."}
        )
        truncation: float = option(
            4.0,
            "Signed distances to the surface of an earlier stage or file are truncated at this number of grid cells; "
            "with a small number, the surface moves further in a step.",
            ge=1,
        )
        gradient_smoothing: Schedule = option(
            0.0,
            "Standard deviation, in grid cells, of the Gaussian filter for the gradient of the signed distances (a "
            "Sobolev gradient), with sdf_source: vertices. 1.5 moves the surface faster and keeps it smooth.",
            ge=0,
            le=8,
        )
        fix_geometry: bool = option(False, "Freeze the surface and train only the features.")
        fix_texture: bool = option(False, "Freeze the features and train only the surface.")

        def validate(self) -> list[str]:
            """Check relations between the options."""
            problems = super().validate() + grid_problems(self.grid)
            if self.resolution % 2 or self.resolution > 256:
                problems.append(f"resolution: must be an even number up to 256, got {self.resolution}")
            if self.fix_geometry and self.fix_texture:
                problems.append(
                    "fix_texture: with fix_geometry, no parameters are left to train; set one of them to false"
                )
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
        for parameter in GridSurface.shape_parameters(self):  # parameters of subclasses do not exist yet
            parameter.requires_grad_(not config.fix_geometry)
        self.texture.requires_grad_(not config.fix_texture)
        self._smoothing = config.gradient_smoothing(0)
        self._lattice: VertexLattice | None = None
        self._cached: tuple[tuple[Any, ...], SurfaceMesh] | None = None
        self._was_empty = False

    @abstractmethod
    def grid_vertices(self) -> tuple[Tensor, float]:
        """(V, 3) undeformed grid vertices, world, and their spacing along an axis, scene units."""

    @abstractmethod
    def extract(self, positions: Tensor, sdf: Tensor) -> SurfaceMesh:
        """The surface on which the signed distances ``sdf`` (V,) at ``positions`` (V, 3) are zero."""

    @abstractmethod
    def grid_edges(self) -> Tensor:
        """(E, 2) int32, the two vertices of each edge of the grid, on the geometry's device."""

    def signed_distances(self) -> Tensor:
        """(V,) signed distances at the grid's vertices, negative inside, scene units; differentiable."""
        return torch.maximum(self._unlimited_distances(), self.border)

    def _unlimited_distances(self) -> Tensor:
        """(V,) signed distances before they are limited by :attr:`border`."""
        if self.config.sdf_source == "vertices":
            sdf: Tensor = self.sdf
            if self._smoothing > 0:  # without a filter, there is no need for the lattice
                sdf = smooth_gradient(sdf, self._lattice_points(), self._smoothing)
            return sdf
        offset: Tensor = self.sdf_network(self.vertices)[:, 0]
        return self.initial_sdf + self.radius * offset

    def _positions(self) -> Tensor:
        """(V, 3) displaced vertices of the grid, world; differentiable."""
        return self.vertices + self.reach[:, None] * self.deform.tanh()

    def shape_parameters(self) -> list[nn.Parameter]:
        """Parameters that determine the surface."""
        return [*self._sdf_parameters(), self.deform]

    def forward(self) -> SurfaceMesh:
        """The mesh at the current parameters; the same object at every step if the geometry is frozen."""
        return self._constant() if self.config.fix_geometry else self._extracted()

    def features(self, points: SurfacePoints) -> Tensor:
        """(N, F) features of points on the mesh."""
        return self.features_at(points.points)

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) features at (N, 3) world points."""
        features: Tensor = self.texture(points)
        return features

    def density(self, points: Tensor) -> Tensor:
        """(N,) exp(-sdf / (0.01 radius)) at (N, 3) world points, with the signed distance to the mesh."""
        return density_of(self.surface(), points, self.radius)

    def surface(self) -> Mesh:
        """The mesh as NumPy arrays."""
        return self._constant().to_mesh()

    def init_from(self, source: GeometryInit, rng: Rng) -> str:
        """Set the signed distances to those of the source's mesh, and fit the features near its surface.

        Raises:
            ValueError: The source has no faces, or the grid does not resolve it.
        """
        if not len(source.mesh.faces):
            raise FieldError("the source mesh has no faces; check the earlier stage or the file")
        limit = self.config.truncation * self.spacing
        with torch.no_grad():
            self.set_distances(distance_to(source.mesh, self.vertices).clamp(-limit, limit))
            mesh = self._constant()
        if not len(mesh.faces):
            raise FieldError(
                f"a grid of {self.config.resolution} cells per axis does not resolve the source mesh; raise it, or "
                "check that the mesh lies inside the ball of geometry.radius",
                "resolution",
            )
        error = float(distance_to(source.mesh, mesh.vertices).abs().mean())
        result = f"{len(mesh.faces):,} faces from the grid, at a mean distance of {error:.2g} from the given surface"
        if source.features is None:
            return result
        near = points_near(source.mesh, 0.5 * self.spacing, self.vertices)
        return f"{result}; features fitted with an RMS error of {self.texture.fit(source.features, near, rng):.2g}"

    def update_step(self, step: int) -> None:
        """Set the smoothing of the gradient, and activate the levels of the hash grids that are due at ``step``."""
        self._smoothing = self.config.gradient_smoothing(step)
        self.texture.update_step(step)
        if self.config.sdf_source == "network":
            self.sdf_network.update_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups ``sdf`` and ``deform`` of the shape, and ``encoding`` and ``network`` of the features."""
        return [
            {"name": "sdf", "params": self._sdf_parameters()},
            {"name": "deform", "params": [self.deform]},
            {"name": "encoding", "params": [self.texture.table]},
            {"name": "network", "params": list(self.texture.network.parameters())},
        ]

    def _sdf_parameters(self) -> list[nn.Parameter]:
        """Parameters that determine the signed distances."""
        return [self.sdf] if self.config.sdf_source == "vertices" else list(self.sdf_network.parameters())

    def set_distances(self, sdf: Tensor) -> None:
        """Set the signed distances at the grid's vertices to ``sdf`` (V,), and reset all other shape parameters."""
        self.deform.zero_()
        if self.config.sdf_source == "vertices":
            self.sdf.copy_(sdf)
        else:
            self.sdf_network.set_zero()
            self.initial_sdf.copy_(sdf)

    @torch.no_grad()
    def carving_evidence(self, views: DepthEstimates | None) -> Tensor:
        """Evidence (4, V) of views at the displaced vertices of the grid, zero without views."""
        if views is None:
            return self.vertices.new_zeros(4, len(self.vertices))
        return carving_evidence(self._positions(), views, self.spacing)

    @torch.no_grad()
    def carve(self, evidence: Tensor) -> int:
        """Remove the matter through which views see; returns the number of vertices that are no longer inside.

        Nothing is removed if less than a twentieth of the inside vertices would be left: the depths must be wrong.
        """
        unlimited, lattice = self._unlimited_distances(), self._lattice_points()
        sdf = torch.maximum(unlimited, self.border)
        values = lattice.dense(torch.cat([sdf[None], evidence.to(sdf)]), torch.tensor([torch.inf, 0, 0, 0, 0]).to(sdf))
        new = lattice.sparse(carved(values[0], values[1:], self.spacing)[None])[0]
        removed = int(((sdf < 0) & (new >= 0)).sum())
        if (new < 0).sum() < _LEAST_LEFT * (sdf < 0).sum():
            return 0
        if self.config.sdf_source == "vertices":
            self.sdf.copy_(torch.where(new > sdf, new, self.sdf))
        else:
            self.initial_sdf += torch.where(new > sdf, new - unlimited, 0.0)
        return removed

    def _extracted(self) -> SurfaceMesh:
        """The mesh at the current parameters; logs a warning when it becomes empty."""
        mesh = self.extract(self._positions(), self.signed_distances())
        if not len(mesh.faces) and not self._was_empty:
            logger.warning(
                "the surface is empty: no signed distance on the grid of %d cells per axis is negative, so renders "
                "show only the background; lower the learning rates of geometry.sdf and geometry.deform, or the "
                "weights of losses that shrink the object",
                self.config.resolution,
            )
        self._was_empty = not len(mesh.faces)
        return mesh

    @torch.no_grad()
    def _constant(self) -> SurfaceMesh:
        """The mesh without gradients; cached until a parameter changes."""
        state = [*self.shape_parameters(), *([self.initial_sdf] if self.config.sdf_source == "network" else [])]
        levels = self.sdf_network.num_active_levels if self.config.sdf_source == "network" else 0
        seen = (levels, *((tensor.data_ptr(), tensor._version) for tensor in state))
        if self._cached is None or self._cached[0] != seen:
            mesh = self._extracted()
            self._cached = seen, SurfaceMesh(mesh.vertices, mesh.faces, fixed_topology=self.config.fix_geometry)
        return self._cached[1]

    def _lattice_points(self) -> VertexLattice:
        """Places of the vertices on a lattice, on the geometry's device."""
        if self._lattice is None or self._lattice.codes.device != self.vertices.device:
            self._lattice = VertexLattice.of(self.vertices, self.spacing, self.radius)
        return self._lattice

    def _reach_of(self, border: Tensor) -> Tensor:
        """(V,) maximum displacements; 0 for vertices whose edges (at most two spacings long) can leave the ball."""
        return torch.where(border < -2 * self.spacing, _MAX_OFFSET * self.spacing, 0.0)

    def _point_field(self, num_outputs: int, generator: torch.Generator) -> PointField:
        """A hash grid with a network, from the options ``grid`` and ``network``."""
        return PointField(
            self.config.grid,
            self.config.network,
            num_outputs=num_outputs,
            radius=self.radius,
            generator=generator,
        )

    def _initial_sdf(self, vertices: Tensor) -> Tensor:
        """(V,) signed distances to the initial shape."""
        mesh = self.config.initial_mesh(self.radius)
        return self.config.initial_distance(vertices, self.radius) if mesh is None else distance_to(mesh, vertices)
