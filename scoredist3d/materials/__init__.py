"""Materials: features of a point and the light on it, to colour."""

from scoredist3d.materials.base import Light, Material

__all__ = ["Light", "Material"]
