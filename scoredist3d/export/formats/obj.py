"""OBJ with its MTL and PNGs; y up by default, like the GLB, because most importers assume it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from scoredist3d.export.bake import Textures
from scoredist3d.export.frame import Y_UP, Frame
from scoredist3d.meshes.mesh import Mesh

# MTL keys of the PBR extension by the textures' names.
_MAPS = {"roughness": "map_Pr", "metallic": "map_Pm", "normal": "norm"}


def write_obj(folder: Path, name: str, mesh: Mesh, textures: Textures, frame: Frame = Y_UP) -> list[Path]:
    """Write ``name.png``, ``name.mtl`` and ``name.obj``, and ``name-roughness.png`` and so on for channels that exist.

    The surface stays closed, seams live in the texture indices. MTL has no key for occlusion, so that stays out.

    Args:
        folder: Written directly; stage it where atomicity matters.
        name: ASCII without spaces (see :func:`scoredist3d.export.files.safe_name`).
        mesh: Unwrapped, world coordinates.
        textures: Of the mesh.
        frame: Axes and unit.

    Returns:
        The paths, each file after those it refers to.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    from PIL import Image

    lines = [f"newmtl {name}", "Ka 0 0 0", "Kd 1 1 1", "Ks 0 0 0", "Ns 1", "d 1", "illum 1", f"map_Kd {name}.png"]
    paths = [folder / f"{name}.png"]
    Image.fromarray(textures.base_color).save(paths[0])
    if textures.has_surface:
        lines += ["Pr 1", f"Pm {int(textures.metallic is not None)}"]
    for channel, key in _MAPS.items():
        image = getattr(textures, channel)
        if image is not None:
            paths.append(folder / f"{name}-{channel}.png")
            Image.fromarray(image).save(paths[-1])
            lines.append(f"{key} {paths[-1].name}")
    material, target = folder / f"{name}.mtl", folder / f"{name}.obj"
    material.write_text("\n".join(lines) + "\n", encoding="ascii")
    with target.open("w", encoding="ascii", newline="\n") as file:
        file.write(f"# {frame.comment}\nmtllib {name}.mtl\no {name}\nusemtl {name}\n")
        file.write(_rows("v", frame.points(mesh.vertices), "%.7g"))
        file.write(_rows("vt", mesh.uvs, "%.7g"))
        file.write(_rows("vn", frame.directions(mesh.vertex_normals()), "%.5g"))
        corners = np.stack([mesh.faces, mesh.uv_faces, mesh.faces], axis=2).reshape(-1, 9) + 1
        file.write(_rows("f", corners, "%d/%d/%d", 3))
    return [*paths, material, target]


def _rows(key: str, values: np.ndarray, item: str, items: int | None = None) -> str:
    """One text line per row of ``values``."""
    buffer = io.StringIO()
    np.savetxt(buffer, values, fmt=f"{key} " + " ".join([item] * (items or values.shape[1])))
    return buffer.getvalue()
