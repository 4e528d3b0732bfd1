"""GLB files, and the change from our world (z up) to the files' world (y up)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scoredist3d.meshes.mesh import Mesh


def to_y_up(vectors: np.ndarray) -> np.ndarray:
    """(x, y, z) of the file = (y, z, x) of ours: up becomes +y and the object's front, our +x, becomes glTF's +z."""
    return np.ascontiguousarray(vectors[:, [1, 2, 0]])


def split_seams(mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One vertex per (vertex, texture coordinate) pair, as glTF wants.

    Returns:
        vertices (N, 3), normals (N, 3), uvs (N, 2), faces (F, 3). Normals are those of the closed surface, so shading
        does not show the seams.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    pairs = mesh.faces.ravel() * len(mesh.uvs) + mesh.uv_faces.ravel()
    unique, faces = np.unique(pairs, return_inverse=True)
    vertex, uv = unique // len(mesh.uvs), unique % len(mesh.uvs)
    return mesh.vertices[vertex], mesh.vertex_normals()[vertex], mesh.uvs[uv], faces.reshape(-1, 3)


def write_glb(path: Path, mesh: Mesh, texture: np.ndarray, name: str, *, unlit: bool = False) -> None:
    """Write a binary glTF with one textured, fully rough, non-metallic material.

    Args:
        path: Written directly; stage it where atomicity matters.
        mesh: Unwrapped, world coordinates.
        texture: (S, S, 3) uint8 display sRGB, row 0 on top.
        name: Name of the node, mesh and material.
        unlit: Declare ``KHR_materials_unlit``: viewers show the texture as it is. The fully rough material stays as the
            fallback of viewers that do not know the extension.
    """
    import trimesh
    from PIL import Image
    from trimesh.exchange.gltf import export_glb

    vertices, normals, uvs, faces = split_seams(mesh)
    material = trimesh.visual.material.PBRMaterial(
        name=name, baseColorTexture=Image.fromarray(texture), metallicFactor=0.0, roughnessFactor=1.0, doubleSided=False
    )
    # trimesh, like us, puts v = 0 at the bottom of the image and turns it over for glTF.
    geometry = trimesh.Trimesh(
        vertices=to_y_up(vertices),
        faces=faces,
        vertex_normals=to_y_up(normals),
        visual=trimesh.visual.TextureVisuals(uv=uvs, material=material),
        process=False,
    )
    scene = trimesh.Scene()
    scene.add_geometry(geometry, node_name=name, geom_name=name)
    data: Any = export_glb(scene, include_normals=True, tree_postprocessor=_declare_unlit if unlit else None)
    path.write_bytes(data)


def _declare_unlit(tree: dict[str, Any]) -> None:
    tree["extensionsUsed"] = sorted({*tree.get("extensionsUsed", []), "KHR_materials_unlit"})
    for material in tree["materials"]:
        material.setdefault("extensions", {})["KHR_materials_unlit"] = {}


def write_ply(path: Path, mesh: Mesh) -> None:
    """Write a binary PLY with vertex colours and normals, y up like the other formats.

    Raises:
        ValueError: The mesh has no vertex colours.
    """
    if mesh.vertex_colors is None:
        raise ValueError("a PLY needs vertex colours")
    import trimesh

    geometry = trimesh.Trimesh(
        vertices=to_y_up(mesh.vertices),
        faces=mesh.faces,
        vertex_normals=to_y_up(mesh.vertex_normals()),
        vertex_colors=mesh.vertex_colors,
        process=False,
    )
    data: Any = geometry.export(file_type="ply", vertex_normal=True)
    path.write_bytes(data)
