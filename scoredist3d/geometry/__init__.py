"""Geometries: density fields, signed distance fields, surface meshes and 3D Gaussians."""

from scoredist3d.geometry.base import (
    DensificationStrategy,
    Field,
    GaussianCloud,
    GaussianSet,
    Geometry,
    GeometryInit,
    GeometryOutput,
    ScreenSpaceMeans,
    SignedDistanceField,
    Surface,
    SurfaceMesh,
    SurfacePoints,
)
from scoredist3d.geometry.protocols import (
    HasCarving,
    HasDensity,
    HasGaussians,
    HasSDFGrid,
    HasSignedDistance,
    HasSurface,
    Initializable,
)

__all__ = [
    "DensificationStrategy",
    "Field",
    "GaussianCloud",
    "GaussianSet",
    "Geometry",
    "GeometryInit",
    "GeometryOutput",
    "HasCarving",
    "HasDensity",
    "HasGaussians",
    "HasSDFGrid",
    "HasSignedDistance",
    "HasSurface",
    "Initializable",
    "ScreenSpaceMeans",
    "SignedDistanceField",
    "Surface",
    "SurfaceMesh",
    "SurfacePoints",
]
