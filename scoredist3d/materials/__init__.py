"""Materials, which map geometry features and light to colors."""

from scoredist3d.materials.base import Light, Material, ShadingInputs

__all__ = ["Light", "Material", "ShadingInputs"]
