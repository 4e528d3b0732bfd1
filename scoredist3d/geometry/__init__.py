"""Geometries: what is at a point of the object's ball (density, features, normal)."""

from scoredist3d.geometry.base import Geometry, GeometryOutput

__all__ = ["Geometry", "GeometryOutput"]
