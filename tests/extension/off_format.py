"""OFF files, the Object File Format of Geomview: a whole export format in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scoredist3d.export.formats.base import register_format
from scoredist3d.export.products import SurfaceProduct


@register_format("off", suffix=".off", needs=SurfaceProduct, summary="OFF text file of the surface, without colors.")
def write_off(path: Path, product: SurfaceProduct) -> list[Path]:
    """Write an OFF file in meters: the header, the vertices, and the faces with their number of corners."""
    mesh = product.mesh
    corners = np.insert(mesh.faces, 0, 3, axis=1)
    with path.open("w", encoding="ascii") as file:
        file.write(f"OFF\n{len(mesh.vertices)} {len(mesh.faces)} 0\n")
        np.savetxt(file, product.frame.points(mesh.vertices), fmt="%.7g")
        np.savetxt(file, corners, fmt="%d")
    return [path]
