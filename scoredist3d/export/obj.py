"""OBJ with its MTL and PNG; y up, like the GLB, because most importers assume it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from scoredist3d.export.gltf import to_y_up
from scoredist3d.meshes.mesh import Mesh


def write_obj(folder: Path, name: str, mesh: Mesh, texture: np.ndarray) -> list[Path]:
    """Write ``name.png``, ``name.mtl`` and ``name.obj``; the surface stays closed, seams live in the texture indices.

    Args:
        folder: Written directly; stage it where atomicity matters.
        name: ASCII without spaces (see :func:`scoredist3d.export.files.safe_name`).
        mesh: Unwrapped, world coordinates.
        texture: (S, S, 3) uint8 display sRGB, row 0 on top.

    Returns:
        The paths, each file after those it refers to.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    from PIL import Image

    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "mtl", "obj")]
    Image.fromarray(texture).save(paths[0])
    paths[1].write_text(
        f"newmtl {name}\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nNs 1\nd 1\nillum 1\nmap_Kd {name}.png\n", encoding="ascii"
    )
    with paths[2].open("w", encoding="ascii", newline="\n") as file:
        file.write(f"# y up, front +z\nmtllib {name}.mtl\no {name}\nusemtl {name}\n")
        file.write(_rows("v", to_y_up(mesh.vertices), "%.7g"))
        file.write(_rows("vt", mesh.uvs, "%.7g"))
        file.write(_rows("vn", to_y_up(mesh.vertex_normals()), "%.5g"))
        corners = np.stack([mesh.faces, mesh.uv_faces, mesh.faces], axis=2).reshape(-1, 9) + 1
        file.write(_rows("f", corners, "%d/%d/%d", 3))
    return paths


def _rows(key: str, values: np.ndarray, item: str, items: int | None = None) -> str:
    """One text line per row of ``values``."""
    buffer = io.StringIO()
    np.savetxt(buffer, values, fmt=f"{key} " + " ".join([item] * (items or values.shape[1])))
    return buffer.getvalue()
