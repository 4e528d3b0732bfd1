"""OBJ: one textured mesh with its MTL file and PNG textures.

The file is y up by default, like GLB, because most importers assume y up.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from scoredist3d.export.formats.base import register_format
from scoredist3d.export.products import TexturedProduct

# Keys of the PBR extension of MTL by texture name.
_MAPS = {"roughness": "map_Pr", "metallic": "map_Pm", "normal": "norm"}


@register_format(
    "obj",
    suffix=".obj",
    needs=TexturedProduct,
    summary="OBJ with its MTL file and the baked textures as PNG files.",
)
def write_obj(path: Path, product: TexturedProduct) -> list[Path]:
    """Write ``name.obj``, ``name.mtl``, ``name.png`` and one ``name-<channel>.png`` per additional texture.

    The surface stays closed: seams exist only in the texture indices. MTL has no key for occlusion, so that texture is
    omitted.

    Args:
        path: ``name.obj``; the name is ASCII without spaces (see :func:`scoredist3d.export.files.safe_name`).
        product: Mesh and textures.

    Returns:
        The paths, each file after those it refers to.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    mesh, textures, frame = product.mesh, product.textures, product.frame
    folder, name = path.parent, path.stem
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
    material = folder / f"{name}.mtl"
    material.write_text("\n".join(lines) + "\n", encoding="ascii")
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write(f"# {frame.comment}\nmtllib {name}.mtl\no {name}\nusemtl {name}\n")
        file.write(_rows("v", frame.points(mesh.vertices), "%.7g"))
        file.write(_rows("vt", mesh.uvs, "%.7g"))
        file.write(_rows("vn", frame.directions(mesh.vertex_normals()), "%.5g"))
        corners = np.stack([mesh.faces, mesh.uv_faces, mesh.faces], axis=2).reshape(-1, 9) + 1
        file.write(_rows("f", corners, "%d/%d/%d", 3))
    return [*paths, material, path]


def _rows(key: str, values: np.ndarray, item: str, items: int | None = None) -> str:
    """Lines of text, one per row of ``values``."""
    buffer = io.StringIO()
    np.savetxt(buffer, values, fmt=f"{key} " + " ".join([item] * (items or values.shape[1])))
    return buffer.getvalue()
