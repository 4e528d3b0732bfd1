"""Protocols for the capabilities of geometries, which renderers, losses, export and conversion check.

The protocols are structural: a class has a capability if it has the methods. The base classes in
:mod:`scoredist3d.geometry.base` are convenient implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from scoredist3d.geometry.base import GaussianSet, GeometryInit, GeometryOutput, SurfaceMesh, SurfacePoints
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.space_carving import DepthEstimates
from scoredist3d.meshes.splats import Splats
from scoredist3d.seeding import Rng


@runtime_checkable
class HasDensity(Protocol):
    """A density field that can be volume-rendered; see :class:`~scoredist3d.geometry.base.Field`."""

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """Values of the field at (N, 3) world points."""

    def extinction(self, points: Tensor) -> Tensor:
        """(N,) extinction per scene unit at (N, 3) world points."""


@runtime_checkable
class HasSignedDistance(HasDensity, Protocol):
    """A signed distance field; see :class:`~scoredist3d.geometry.base.SignedDistanceField`."""

    def sdf(self, points: Tensor) -> Tensor:
        """(N,) signed distances at (N, 3) world points, negative inside, scene units."""

    def sdf_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) gradients of :meth:`sdf`, differentiable in the parameters."""

    def freeze_extinction(self) -> None:
        """Stop learning the map from distance to extinction."""


@runtime_checkable
class HasSurface(Protocol):
    """A triangle mesh that can be rasterized; see :class:`~scoredist3d.geometry.base.Surface`."""

    def forward(self) -> SurfaceMesh:
        """The differentiable mesh at the current parameters."""

    def features(self, points: SurfacePoints) -> Tensor:
        """(N, F) features of points on the mesh."""

    def surface(self) -> Mesh:
        """The mesh as NumPy arrays, for export and conversion."""


@runtime_checkable
class HasSDFGrid(Protocol):
    """Signed distances at the vertices of a grid."""

    def signed_distances(self) -> Tensor:
        """(V,) signed distances at the grid's vertices, negative inside, scene units."""

    def grid_edges(self) -> Tensor:
        """(E, 2) int32, the two vertices of each edge of the grid."""


@runtime_checkable
class HasCarving(Protocol):
    """A surface from which depths can remove matter; see :class:`~scoredist3d.geometry.grid_surface.GridSurface`."""

    def carving_evidence(self, views: DepthEstimates | None) -> Tensor:
        """Evidence of views at the points of a grid, zero without views; that of several sets of views adds up."""

    def carve(self, evidence: Tensor) -> int:
        """Remove the matter through which views see; returns the number of grid points that are no longer inside."""


@runtime_checkable
class HasGaussians(Protocol):
    """3D Gaussians that can be rendered by splatting; see :class:`~scoredist3d.geometry.base.GaussianCloud`."""

    def forward(self) -> GaussianSet:
        """The differentiable Gaussians at the current parameters."""

    def splats(
        self, colors: Callable[[Tensor], Tensor], harmonics: Callable[[Tensor], Tensor | None] = lambda _: None
    ) -> Splats:
        """The Gaussians with their colors, for export."""


@runtime_checkable
class Initializable(Protocol):
    """A geometry that can be initialized from another object."""

    def init_from(self, source: GeometryInit, rng: Rng) -> str:
        """Replace the current object with ``source``; returns a description of the result for the log.

        Args:
            source: Surface and colors of the object.
            rng: Random streams; equal on all ranks.

        Raises:
            ValueError: This geometry cannot represent ``source``.
        """


_NOUNS: dict[type, str] = {
    HasDensity: "a density field",
    HasSignedDistance: "a signed distance field",
    HasSurface: "a triangle mesh",
    HasCarving: "a surface with signed distances on a grid",
    HasSDFGrid: "a surface extracted from signed distances on a grid",
    HasGaussians: "a set of 3D Gaussians",
    Initializable: "a geometry that can be initialized from another object",
}


def describe_capability(kind: type) -> str:
    """A noun phrase for the capability ``kind`` in error messages, e.g. ``a triangle mesh``."""
    return _NOUNS.get(kind, f"a {kind.__name__}")
