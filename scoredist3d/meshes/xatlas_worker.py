"""Script that runs xatlas in a separate process: ``python xatlas_worker.py input.npz output.npz``.

xatlas can take minutes on a noisy surface and cannot be interrupted, so :mod:`scoredist3d.meshes.uv` runs this file
with a time limit. It does not import the package.
"""

from __future__ import annotations

import sys

import numpy as np


def main(source: str, target: str) -> None:
    """Unwrap the mesh in ``source`` (``vertices``, ``faces``) and write ``uvs`` and ``uv_faces`` to ``target``."""
    import xatlas

    with np.load(source) as data:
        vertices, faces = data["vertices"], data["faces"]
        resolution, padding = int(data["resolution"]), int(data["padding"])
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices.astype(np.float32), faces.astype(np.uint32))
    options = xatlas.PackOptions()
    options.resolution = resolution
    options.padding = padding
    atlas.generate(xatlas.ChartOptions(), options)
    _, uv_faces, uvs = atlas[0]
    np.savez(target, uvs=uvs, uv_faces=uv_faces.astype(np.int64), pages=atlas.atlas_count, charts=atlas.chart_count)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
