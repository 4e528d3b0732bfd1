"""Texture coordinates: xatlas under a time limit, or a plain atlas of one triangle per half cell."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.texels import overlap

logger = logging.getLogger(__name__)

# The largest fraction of the surface, or of the used texels, that may have no place of its own on the texture.
_TOLERANCE = 0.01
_OVERLAP_SIZE = 512
_WORKER = Path(__file__).with_name("xatlas_worker.py")


def unwrap(mesh: Mesh, texture_size: int, *, padding: int = 4, timeout: float = 60.0) -> tuple[Mesh, str]:
    """Give the mesh texture coordinates.

    Args:
        mesh: Decimated first: xatlas needs 1 s for 8,000 faces but a minute for 80,000.
        texture_size: Side of the square texture in texels.
        padding: Texels between charts.
        timeout: Seconds that xatlas may take; 0 goes straight to :func:`face_atlas`.

    Returns:
        The mesh with ``uvs`` and ``uv_faces``, and "" or a sentence on why the fallback atlas was used.
    """
    reason = "its time limit is 0"
    if timeout > 0:
        try:
            return _xatlas(mesh, texture_size, padding, timeout), ""
        except subprocess.TimeoutExpired:
            reason = f"it took longer than {timeout:g} s for {len(mesh.faces)} faces"
        except RuntimeError as error:
            reason = str(error)
    note = f"xatlas was not used ({reason}): every face has its own piece of texture, so mip-maps may show seams"
    logger.warning(note)
    return face_atlas(mesh, texture_size), note


def unusable_uvs(mesh: Mesh) -> str:
    """Why a texture cannot be baked onto the mesh's texture coordinates, or an empty string.

    Baking needs one place inside the texture for each point of the surface: coordinates outside of [0, 1], faces
    without an area on the texture, and faces that share texels cannot be used.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    if mesh.uvs.min() < -1e-4 or mesh.uvs.max() > 1 + 1e-4:
        low, high = float(mesh.uvs.min()), float(mesh.uvs.max())
        return f"they reach from {low:.3g} to {high:.3g}, beyond the texture"
    corners = mesh.uvs[mesh.uv_faces].astype(np.float64)
    (du1, dv1), (du2, dv2) = (corners[:, 1] - corners[:, 0]).T, (corners[:, 2] - corners[:, 0]).T
    areas = mesh.face_areas
    lost = float(areas[np.abs(du1 * dv2 - du2 * dv1) < 1e-14].sum() / max(float(areas.sum()), 1e-20))
    if lost > _TOLERANCE:
        return f"{100 * lost:.0f} % of the surface has no place on the texture"
    shared = overlap(mesh, _OVERLAP_SIZE)
    return f"{100 * shared:.0f} % of the used texels belong to several faces" if shared > _TOLERANCE else ""


def _xatlas(mesh: Mesh, texture_size: int, padding: int, timeout: float) -> Mesh:
    """Unwrap in a child process.

    Raises:
        subprocess.TimeoutExpired: The limit was reached (the child has been killed).
        RuntimeError: xatlas is missing, crashed, or its charts do not form one valid page.
    """
    with tempfile.TemporaryDirectory(prefix="scoredist3d-uv-") as folder:
        source, target = Path(folder) / "mesh.npz", Path(folder) / "atlas.npz"
        np.savez(source, vertices=mesh.vertices, faces=mesh.faces, resolution=texture_size, padding=padding)
        # -P keeps this package's folder off the child's import path: its module names must not hide other packages.
        command = [sys.executable, "-P", str(_WORKER), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode != 0 or not target.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"it failed with exit code {done.returncode}: {last}")
        with np.load(target) as data:
            uvs, uv_faces, pages = data["uvs"].astype(np.float32), data["uv_faces"], int(data["pages"])
    if pages != 1 or uv_faces.shape != mesh.faces.shape or not np.isfinite(uvs).all():
        raise RuntimeError(f"it gave {pages} pages and {len(uv_faces)} faces for {len(mesh.faces)}")
    # Charts touch the atlas border; half the padding there keeps repeating samplers from mixing opposite borders.
    inset = 0.5 * padding / texture_size
    return replace(mesh, uvs=inset + (1.0 - 2.0 * inset) * uvs.clip(0.0, 1.0), uv_faces=uv_faces)


def face_atlas(mesh: Mesh, texture_size: int) -> Mesh:
    """An atlas that always works: a grid of square cells, each holding two faces as right triangles with a gap between.

    Raises:
        ValueError: Fewer than 8 texels per cell side; the message names the settings.
    """
    count = len(mesh.faces)
    most = 2 * (texture_size // 8) ** 2
    columns = max(1, math.ceil(math.sqrt(math.ceil(count / 2))))
    cell = texture_size / columns
    if cell < 8:
        raise ValueError(
            f"a texture of {texture_size}^2 texels is too small for {count} faces with a piece each: "
            f"set exporter.texture_size to at least {8 * columns} or exporter.max_faces to at most {most}"
        )
    edge, gap = 1.5, 3.0  # texels to the cell's border, and between the two triangles along an axis
    near, far = edge, cell - edge - gap
    lower = np.array([[near, near], [far, near], [near, far]])
    corners = np.stack([lower, cell - lower])
    pair = np.arange(count) // 2
    origin = np.stack([pair % columns, pair // columns], axis=1) * cell
    uvs = (origin[:, None, :] + corners[np.arange(count) % 2]) / texture_size
    uv_faces = np.arange(3 * count, dtype=np.int64).reshape(-1, 3)
    return replace(mesh, uvs=uvs.reshape(-1, 2).astype(np.float32), uv_faces=uv_faces)
