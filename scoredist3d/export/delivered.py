"""Exported files as they are delivered: read back, in scene units, ready to be drawn and measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scoredist3d.cameras import Cameras
from scoredist3d.export.bake import Textures
from scoredist3d.export.drawing import MeshViews, draw_mesh
from scoredist3d.meshes.loading import LoadedMesh, load_mesh
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.texels import rasterize

_JSON_LENGTH, _JSON_START = slice(12, 16), 20  # bytes of a GLB file


@dataclass(frozen=True)
class Delivered:
    """A mesh as a GLB file has it.

    Attributes:
        mesh: Mesh in world coordinates (z up), scene units.
        textures: Base color and normal map, with the texels on the mesh; None for a file without base color.
        unlit: Whether the file says that its colors include the lighting.
    """

    mesh: Mesh
    textures: Textures | None
    unlit: bool

    def views(self, cameras: Cameras) -> MeshViews:
        """Images from cameras outside of the object, in the colors of the file, which are not lit here."""
        reach = float(np.linalg.norm(self.mesh.vertices, axis=1).max())
        return draw_mesh(self.mesh, self.textures, cameras, reach, lit=False)


def read_delivered(
    path: Path, *, scale: float = 1.0, origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Delivered:
    """Read a GLB file that was exported.

    Args:
        path: The file.
        scale: Meters per scene unit in the file, as the report on the export has it.
        origin: World position of the file's origin, as the report on the export has it.

    Raises:
        ValueError: The file cannot be read or has no triangles.
    """
    loaded = load_mesh(path)
    vertices = loaded.mesh.vertices / np.float32(scale) + np.asarray(origin)
    mesh = replace(loaded.mesh, vertices=vertices.astype(np.float32))
    return Delivered(mesh, _textures(loaded), _is_unlit(path))


def _textures(loaded: LoadedMesh) -> Textures | None:
    color, mesh = loaded.base_color, loaded.mesh
    if color is None or mesh.uvs is None:
        return None
    height, width = color.shape[:2]
    covered = rasterize(mesh, height).mask(height) if height == width else None
    return Textures(color, normal=loaded.normal, covered=covered)


def _is_unlit(path: Path) -> bool:
    """Whether a GLB file declares ``KHR_materials_unlit``, which trimesh does not report."""
    data = path.read_bytes()
    length = int.from_bytes(data[_JSON_LENGTH], "little")
    document = json.loads(data[_JSON_START : _JSON_START + length])
    return "KHR_materials_unlit" in document.get("extensionsUsed", [])
