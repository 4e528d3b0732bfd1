"""Texture images of the materials in mesh files, as trimesh reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from scoredist3d.meshes.mesh_files import MeshFolder
from scoredist3d.meshes.textures import Images, to_bytes, to_display, to_linear


def pbr_images(material: Any, folder: MeshFolder) -> Images:
    """Images of a glTF material, multiplied by its factors."""
    base = folder.pixels(material.baseColorTexture, "RGB")
    if material.baseColorFactor is not None:
        factor = _finite(material.baseColorFactor, folder)[:3] / 255.0
        base = np.full((1, 1, 3), 255, dtype=np.uint8) if base is None else base
        base = base if (factor == 1.0).all() else to_bytes(to_display(to_linear(base / 255.0) * factor))
    packed = folder.pixels(material.metallicRoughnessTexture, "RGB")
    scalars = {}
    for name, channel, value in (("roughness", 1, material.roughnessFactor), ("metallic", 2, material.metallicFactor)):
        image = np.full((1, 1), 255, dtype=np.uint8) if packed is None else packed[..., channel]
        # The default factor is 1.
        scalars[name] = to_bytes(image / 255.0 * (1.0 if value is None else _finite(value, folder)))
    return Images(base, **scalars, normal=folder.pixels(material.normalTexture, "RGB"))


def mtl_images(material: Any, folder: MeshFolder) -> Images:
    """Images of an OBJ material (Kd, map_Kd, Pr, map_Pr, Pm, map_Pm, norm)."""
    keys = getattr(material, "kwargs", {})
    base = folder.pixels(material.image, "RGB")
    color = keys.get("kd")
    if color is not None and np.size(color) >= 3:
        shade = _finite(color, folder)[:3]
        base = to_bytes(shade.reshape(1, 1, 3) if base is None else base / 255.0 * shade)
    return Images(
        base,
        roughness=_mtl_scalar(keys, "pr", folder),
        metallic=_mtl_scalar(keys, "pm", folder),
        normal=folder.pixels(_file_of(keys, "norm"), "RGB"),
    )


def _mtl_scalar(keys: dict[str, Any], name: str, folder: MeshFolder) -> np.ndarray | None:
    image = folder.pixels(_file_of(keys, f"map_{name}"), "L")
    value = keys.get(name)
    if image is not None or value is None:
        return image
    return to_bytes(np.full((1, 1), _finite(value[0], folder)))


def _finite(values: Any, folder: MeshFolder) -> np.ndarray:
    """Factors of a material as float64.

    Raises:
        ValueError: A value is not a finite number.
    """
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except ValueError:
        numbers = np.asarray(np.nan)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{folder.mesh.name} has a material whose factors are not finite: repair the file first")
    return numbers


def _file_of(keys: dict[str, Any], name: str) -> str | None:
    """The file of an MTL statement, which is its last word."""
    words = keys.get(name)
    return words[-1] if words else None
