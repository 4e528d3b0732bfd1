"""Geometries: fields, surfaces and Gaussians in the object's ball."""

from scoredist3d.geometry.base import (
    Field,
    GaussianCloud,
    GaussianSet,
    Geometry,
    GeometryInit,
    GeometryOutput,
    SignedDistanceField,
    Surface,
    SurfaceMesh,
    SurfacePoints,
)

__all__ = [
    "Field",
    "GaussianCloud",
    "GaussianSet",
    "Geometry",
    "GeometryInit",
    "GeometryOutput",
    "SignedDistanceField",
    "Surface",
    "SurfaceMesh",
    "SurfacePoints",
]
