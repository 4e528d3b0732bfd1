"""STL: the surface before simplification, without colors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scoredist3d.export.formats.base import register_format
from scoredist3d.export.products import SurfaceProduct


@register_format("stl", suffix=".stl", needs=SurfaceProduct, summary="Binary STL of the surface before simplification.")
def write_stl(path: Path, product: SurfaceProduct) -> list[Path]:
    """Write a binary STL file; its 80-byte header names the up axis."""
    frame = product.frame
    corners = frame.points(product.mesh.vertices)[product.mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    kind = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    records = np.zeros(len(corners), dtype=kind)
    records["normal"], records["corners"] = normals, corners
    # Readers mistake a header that begins with "solid" for the text variant of STL.
    header = f"binary STL, {frame.comment}".encode("ascii").ljust(80)
    path.write_bytes(header + np.uint32(len(corners)).astype("<u4").tobytes() + records.tobytes())
    return [path]
