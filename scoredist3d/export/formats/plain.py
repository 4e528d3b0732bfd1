"""PLY and STL: surfaces without textures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scoredist3d.export.frame import Y_UP, Frame
from scoredist3d.meshes.mesh import Mesh


def write_ply(path: Path, mesh: Mesh, frame: Frame = Y_UP) -> None:
    """Write a binary PLY with vertex colours and normals.

    Raises:
        ValueError: The mesh has no vertex colours.
    """
    if mesh.vertex_colors is None:
        raise ValueError("a PLY needs vertex colours")
    import trimesh

    geometry = trimesh.Trimesh(
        vertices=frame.points(mesh.vertices),
        faces=mesh.faces,
        vertex_normals=frame.directions(mesh.vertex_normals()),
        vertex_colors=mesh.vertex_colors,
        process=False,
    )
    data: Any = geometry.export(file_type="ply", vertex_normal=True)
    path.write_bytes(data.replace(b"\nelement vertex", f"\ncomment {frame.comment}\nelement vertex".encode(), 1))


def write_stl(path: Path, mesh: Mesh, frame: Frame = Y_UP) -> None:
    """Write a binary STL; its 80 byte header says which axis is up."""
    corners = frame.points(mesh.vertices)[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    kind = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    records = np.zeros(len(corners), dtype=kind)
    records["normal"], records["corners"] = normals, corners
    # A header that begins with "solid" would look like the text form.
    header = f"binary STL, {frame.comment}".encode("ascii").ljust(80)
    path.write_bytes(header + np.uint32(len(corners)).astype("<u4").tobytes() + records.tobytes())
