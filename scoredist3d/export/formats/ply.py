"""PLY: the surface before simplification, with vertex colors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scoredist3d.export.formats.base import register_format
from scoredist3d.export.products import ColoredSurfaceProduct


@register_format(
    "ply",
    suffix=".ply",
    needs=ColoredSurfaceProduct,
    summary="Binary PLY of the surface before simplification, with vertex colors and normals.",
)
def write_ply(path: Path, product: ColoredSurfaceProduct) -> list[Path]:
    """Write a binary PLY file with vertex colors and normals; a comment in its header names the up axis.

    Raises:
        ValueError: The mesh has no vertex colors.
    """
    mesh, frame = product.mesh, product.frame
    if mesh.vertex_colors is None:
        raise ValueError("ply: the mesh has no vertex colors; set Mesh.vertex_colors")
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
    return [path]
