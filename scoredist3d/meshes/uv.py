"""UV unwrapping: xatlas with a time limit, or a simple atlas that places each face separately."""

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

# Largest acceptable fraction of the surface without area in the texture, and of used texels shared by several faces.
_TOLERANCE = 0.01
_OVERLAP_SIZE = 512
_WORKER = Path(__file__).with_name("xatlas_worker.py")


def unwrap(mesh: Mesh, texture_size: int, *, padding: int = 4, timeout: float = 60.0) -> tuple[Mesh, str]:
    """Compute texture coordinates of a mesh.

    Args:
        mesh: Mesh, which should be decimated: xatlas takes 1 s for 8,000 faces but a minute for 80,000.
        texture_size: Side of the square texture, texels.
        padding: Distance between charts, texels.
        timeout: Time limit of xatlas, seconds; 0 uses :func:`face_atlas` without trying xatlas.

    Returns:
        The mesh with ``uvs`` and ``uv_faces``, and a sentence with the reason for the fallback atlas ("" without it).
    """
    reason = "its time limit is 0"
    if timeout > 0:
        try:
            return _xatlas(mesh, texture_size, padding, timeout), ""
        except subprocess.TimeoutExpired:
            reason = f"it took longer than {timeout:g} s for {len(mesh.faces)} faces"
        except RuntimeError as error:
            reason = str(error)
    note = f"xatlas was not used ({reason}): every face has its own chart, so mipmaps may show seams"
    logger.warning(note)
    return face_atlas(mesh, texture_size), note


def unusable_uvs(mesh: Mesh) -> str:
    """Reason why textures cannot be baked with the mesh's own texture coordinates; empty if they can.

    Baking needs a unique point inside the texture for each surface point, so coordinates outside [0, 1], faces without
    area in the texture and faces that share texels are unusable.

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
        return f"{100 * lost:.0f} % of the surface has no area in the texture"
    shared = overlap(mesh, _OVERLAP_SIZE)
    return f"{100 * shared:.0f} % of the used texels belong to several faces" if shared > _TOLERANCE else ""


def _xatlas(mesh: Mesh, texture_size: int, padding: int, timeout: float) -> Mesh:
    """Unwrap with xatlas in a child process.

    Raises:
        subprocess.TimeoutExpired: The time limit was reached; the child process has been killed.
        RuntimeError: xatlas is not installed, crashed, or did not return one valid page of charts.
    """
    with tempfile.TemporaryDirectory(prefix="scoredist3d-uv-") as folder:
        source, target = Path(folder) / "mesh.npz", Path(folder) / "atlas.npz"
        np.savez(source, vertices=mesh.vertices, faces=mesh.faces, resolution=texture_size, padding=padding)
        # -P keeps the folder of the script off the import path, where its modules could shadow other packages.
        command = [sys.executable, "-P", str(_WORKER), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode != 0 or not target.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"it failed with exit code {done.returncode}: {last}")
        with np.load(target) as data:
            uvs, uv_faces, pages = data["uvs"].astype(np.float32), data["uv_faces"], int(data["pages"])
    if pages != 1 or uv_faces.shape != mesh.faces.shape or not np.isfinite(uvs).all():
        raise RuntimeError(f"it returned {pages} pages and {len(uv_faces)} faces for a mesh of {len(mesh.faces)} faces")
    # Charts touch the border of the atlas; insetting them keeps repeating samplers from mixing opposite borders.
    inset = 0.5 * padding / texture_size
    return replace(mesh, uvs=inset + (1.0 - 2.0 * inset) * uvs.clip(0.0, 1.0), uv_faces=uv_faces)


def face_atlas(mesh: Mesh, texture_size: int) -> Mesh:
    """Atlas with one chart per face, for any mesh: a grid of square cells, each with two faces as right triangles.

    Raises:
        ValueError: The texture is too small: cells have fewer than 8 texels per side.
    """
    count = len(mesh.faces)
    most = 2 * (texture_size // 8) ** 2
    columns = max(1, math.ceil(math.sqrt(math.ceil(count / 2))))
    cell = texture_size / columns
    if cell < 8:
        raise ValueError(
            f"a texture of {texture_size}^2 texels is too small for {count} separate faces: "
            f"set exporter.texture_size to at least {8 * columns} or exporter.max_faces to at most {most}"
        )
    edge, gap = 1.5, 3.0  # distance to the border of the cell, and between its two triangles along an axis, texels
    near, far = edge, cell - edge - gap
    lower = np.array([[near, near], [far, near], [near, far]])
    corners = np.stack([lower, cell - lower])
    pair = np.arange(count) // 2
    origin = np.stack([pair % columns, pair // columns], axis=1) * cell
    uvs = (origin[:, None, :] + corners[np.arange(count) % 2]) / texture_size
    uv_faces = np.arange(3 * count, dtype=np.int64).reshape(-1, 3)
    return replace(mesh, uvs=uvs.reshape(-1, 2).astype(np.float32), uv_faces=uv_faces)


def with_own_uvs(own: Mesh, mesh: Mesh, problem: str) -> tuple[Mesh, str]:
    """The mesh with the texture coordinates of ``own`` if they still fit, and the reason if they are lost.

    Args:
        own: The mesh before clean-up.
        mesh: The mesh after clean-up and simplification.
        problem: The reason why the texture coordinates of ``own`` are unusable, or an empty string.
    """
    if own.uvs is None:
        return mesh, ""
    if mesh.faces is not own.faces:
        problem = f"the faces changed ({len(own.faces):,} before, {len(mesh.faces):,} now)"
    if problem:
        return mesh, f"the mesh's texture coordinates were replaced by new ones: {problem}"
    return replace(mesh, uvs=own.uvs, uv_faces=own.uv_faces), ""
