"""Loading of mesh files: geometry, texture coordinates and materials, in world coordinates.

Files are read by trimesh. Multiple objects and materials are merged into one mesh with one set of texture images.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.material_images import mtl_images, pbr_images
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.mesh_files import MeshFolder, check_geometry, read_scene
from scoredist3d.meshes.tangents import corner_tangents
from scoredist3d.meshes.textures import Images, into_unit_square, join, sample_image, to_bytes, to_display
from scoredist3d.paths import find_shipped

logger = logging.getLogger(__name__)

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl")
Up = Literal["y", "z", "auto"]


@dataclass(frozen=True)
class LoadedMesh:
    """Mesh with texture images, top row first; an image is ``None`` if the file has none, 1 x 1 if it is constant.

    Attributes:
        mesh: Mesh in world coordinates, with the texture coordinates and vertex colors of the file, if it has any.
        base_color: (H, W, 3) uint8, display sRGB.
        roughness: (H, W) uint8, linear.
        metallic: (H, W) uint8, linear.
        normal: (H, W, 3) uint8, tangent space, linear.
        uv_changes: Description of how the texture coordinates were changed, as a clause without its subject ("were
            moved ..."); empty if they equal those of the file.
    """

    mesh: Mesh
    base_color: np.ndarray | None = None
    roughness: np.ndarray | None = None
    metallic: np.ndarray | None = None
    normal: np.ndarray | None = None
    uv_changes: str = ""

    def fitted(self, radius: float, margin: float = 0.9) -> LoadedMesh:
        """Copy whose mesh is centered and scaled by :func:`fit_into`."""
        return replace(self, mesh=fit_into(self.mesh, radius, margin))

    @property
    def has_colors(self) -> bool:
        """Whether the file has colors, which :meth:`appearance` requires."""
        return self.base_color is not None or self.mesh.vertex_colors is not None

    def appearance(self, points: Tensor) -> SurfaceChannels:
        """Appearance at the surface points closest to ``points`` (N, 3), in world coordinates.

        Raises:
            ValueError: The file has neither a texture nor vertex colors.
        """
        if not self.has_colors:
            raise ValueError(
                "the mesh has no colors: its file has neither a texture nor vertex colors; add one of them"
            )
        from scoredist3d.ops.mesh.distance import closest_point

        mesh, device = self.mesh, points.device
        vertices = torch.from_numpy(mesh.vertices).to(device)
        faces = torch.from_numpy(mesh.faces).to(device)
        found = closest_point(points, vertices, faces)
        face, weights = found.faces, found.barycentric
        uv = None
        if mesh.uvs is not None and mesh.uv_faces is not None:
            uv = _mix(torch.from_numpy(mesh.uvs).to(device), torch.from_numpy(mesh.uv_faces).to(device)[face], weights)
        if self.base_color is not None:
            base_color = _sample(self.base_color, uv, points)
        else:
            assert mesh.vertex_colors is not None
            base_color = _mix(torch.from_numpy(mesh.vertex_colors).to(device) / 255.0, faces[face], weights)
        return SurfaceChannels(
            base_color.clamp(0.0, 1.0),
            roughness=None if self.roughness is None else _sample(self.roughness, uv, points)[:, 0],
            metallic=None if self.metallic is None else _sample(self.metallic, uv, points)[:, 0],
            normal=None if self.normal is None else self._normals(self.normal, uv, face, weights),
        )

    @cached_property
    def _tangents(self) -> np.ndarray:
        return corner_tangents(self.mesh)

    def _normals(self, image: np.ndarray, uv: Tensor | None, face: Tensor, weights: Tensor) -> Tensor:
        """World-space normals (N, 3) from the normal map."""
        corners = torch.from_numpy(self._tangents).to(face.device)[face]
        smooth = torch.from_numpy(self.mesh.vertex_normals()[self.mesh.faces]).to(face.device)[face]
        normal = F.normalize((weights[..., None] * smooth).sum(dim=1), dim=-1)
        tangent = (weights[..., None] * corners[..., :3]).sum(dim=1)
        tangent = F.normalize(tangent - (tangent * normal).sum(dim=-1, keepdim=True) * normal, dim=-1)
        bitangent = corners[:, 0, 3:] * torch.linalg.cross(normal, tangent)
        local = 2.0 * _sample(image, uv, weights) - 1.0
        return F.normalize(local[:, :1] * tangent + local[:, 1:2] * bitangent + local[:, 2:] * normal, dim=-1)


def load_mesh(path: Path | str, up: Up = "auto") -> LoadedMesh:
    """Read a ``.glb``, ``.gltf``, ``.obj``, ``.ply`` or ``.stl`` file.

    All objects of a scene are transformed and merged, and polygons are triangulated. Vertices at the same position are
    merged; texture coordinates are stored per face corner. The order of faces and vertices is preserved. Triangles with
    two corners at the same position are removed and logged. Color factors are multiplied into the images, multiple
    materials are packed into one atlas, and repeated textures are tiled so that coordinates are in [0, 1].

    Args:
        path: A local file, relative to the working directory, or one of the files shipped with the program
            (sketches). Texture files that it refers to are also read.
        up: Up axis of the file. ``y`` maps +y up and +z forward to +z up and +x forward; ``z`` keeps the coordinates.
            ``auto`` uses the axis named in a "y up" or "z up" comment in OBJ, PLY and STL files (the exporter writes
            one); without such a comment, it means y for glTF and OBJ, and z for PLY and STL.

    Raises:
        ValueError: The file does not exist, has an unsupported suffix, cannot be parsed, or has no triangles.
    """
    path = find_shipped(path) or Path(path)
    if not path.is_file():
        raise ValueError(
            f"the mesh file {path} does not exist: check the path, which is relative to the working directory"
        )
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot read {path.name}: its suffix must be one of {', '.join(SUFFIXES)}, not {suffix!r}")
    scene, folder = read_scene(path)
    parts = [part for geometry, transform in scene if (part := _part(folder, geometry, transform)) is not None]
    if not parts:
        raise ValueError(f"{path.name} has no mesh: it has no triangles (point clouds and lines are not supported)")
    loaded = _joined(path, parts)
    axis = _up_of(path) if up == "auto" else up
    vertices = loaded.mesh.vertices[:, [2, 0, 1]] if axis == "y" else loaded.mesh.vertices
    return replace(loaded, mesh=replace(loaded.mesh, vertices=np.ascontiguousarray(vertices)))


def fit_into(mesh: Mesh, radius: float, margin: float = 0.9) -> Mesh:
    """Center a mesh (by its bounding box) and scale it so that its farthest vertex has norm ``margin * radius``.

    Raises:
        ValueError: All vertices are at the same position.
    """
    low, high = (bound.astype(np.float64) for bound in mesh.bounds)
    centered = mesh.vertices - 0.5 * (low + high)
    reach = float(np.linalg.norm(centered, axis=1).max())
    if not reach > 0:
        raise ValueError("the mesh has no extent: all its vertices are at the same position")
    return replace(mesh, vertices=(centered * (margin * radius / reach)).astype(np.float32))


def _mix(values: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (N, C) of the rows ``indices`` (N, 3) of ``values``."""
    return (weights[..., None] * values[indices]).sum(dim=1)


def _sample(image: np.ndarray, uv: Tensor | None, like: Tensor) -> Tensor:
    """Texture samples (N, C); a 1 x 1 image needs no coordinates."""
    return sample_image(image, like.new_zeros(len(like), 2) if uv is None else uv)


@dataclass(frozen=True)
class _Part:
    """One object of a file, in the file's axes, with the images of its material."""

    vertices: np.ndarray
    faces: np.ndarray
    corner_uvs: np.ndarray | None
    colors: np.ndarray | None
    images: Images
    uvs_moved: bool = False


def _part(folder: MeshFolder, geometry: Any, transform: np.ndarray) -> _Part | None:
    """Convert a trimesh object; None if it has no faces."""
    faces = np.asarray(geometry.faces, dtype=np.int64)
    if len(faces) == 0:
        return None
    with np.errstate(invalid="ignore", over="ignore"):  # checked below
        vertices = np.asarray(geometry.vertices, dtype=np.float64) @ transform[:3, :3].T + transform[:3, 3]
    path = folder.mesh
    uvs = getattr(geometry.visual, "uv", None)
    check_geometry(path, vertices, faces, uvs)
    if np.linalg.det(transform[:3, :3]) < 0:
        faces = faces[:, ::-1]  # a reflection reverses the winding
    material = getattr(geometry.visual, "material", None)
    linear = path.suffix.lower() in (".glb", ".gltf")
    images = Images() if material is None else pbr_images(material, folder) if linear else mtl_images(material, folder)
    corner_uvs = None if uvs is None or len(uvs) != len(vertices) else np.asarray(uvs, dtype=np.float64)[faces]
    own = images
    if corner_uvs is not None and images.need_uvs:
        corner_uvs, images = into_unit_square(corner_uvs, images)
    moved = images is not own
    if corner_uvs is None:
        images = _constant(images)
    return _Part(vertices.astype(np.float32), faces, corner_uvs, _vertex_colors(geometry, linear), images, moved)


def _constant(images: Images) -> Images:
    """Images reduced to their mean values, for objects without texture coordinates; the normal map is dropped."""
    means = {
        name: np.round(image.mean(axis=(0, 1), keepdims=True)).astype(np.uint8)
        for name, image in images.named().items()
        if name != "normal"
    }
    return Images(**means)


def _vertex_colors(geometry: Any, linear: bool) -> np.ndarray | None:
    """Vertex colors (V, 3) uint8, display sRGB; ``linear`` is true if the file stores linear values, as glTF does."""
    visual = geometry.visual
    attribute = getattr(visual, "vertex_attributes", {}).get("color")
    if attribute is None:
        if visual.kind not in ("vertex", "face"):
            return None
        attribute = np.asarray(visual.vertex_colors)
    values = np.asarray(attribute)[:, :3]
    if not np.isfinite(values).all():
        raise ValueError("the mesh file has vertex colors that are not finite: repair the file first")
    if not np.issubdtype(values.dtype, np.floating):
        values = values / np.iinfo(values.dtype).max
    return to_bytes(to_display(values) if linear else values)


def _joined(path: Path, parts: list[_Part]) -> LoadedMesh:
    """Merge the objects of a file into one mesh with one set of images."""
    offsets = np.cumsum([0, *(len(part.vertices) for part in parts)])
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets[:-1], strict=True)])
    images, corner_uvs, changes = _joined_images(parts)
    vertices, merged = _unique_rows(np.concatenate([part.vertices for part in parts]))
    faces = merged[faces]
    keep = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    if not keep.any():
        raise ValueError(f"{path.name} has no mesh: all its {len(faces)} triangles are degenerate")
    if not keep.all():
        left = f"{int((~keep).sum()):,} of its {len(faces):,} triangles"
        logger.info("%s: %s have two corners at the same position and are removed", path.name, left)
    colors = _joined_colors(parts, merged, len(vertices))
    mesh = Mesh(vertices, faces[keep], vertex_colors=colors, authored=True)
    if corner_uvs is not None:
        uvs, index = _unique_rows(corner_uvs[keep].reshape(-1, 2).astype(np.float32))
        mesh = replace(mesh, uvs=uvs, uv_faces=index.reshape(-1, 3).astype(np.int64))
    used, index = np.unique(mesh.faces, return_inverse=True)
    mesh = replace(
        mesh,
        vertices=np.ascontiguousarray(mesh.vertices[used]),
        faces=index.reshape(-1, 3).astype(np.int64),
        vertex_colors=None if colors is None else colors[used],
    )
    return LoadedMesh(mesh, **images.named(), uv_changes=changes)


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unique rows of (N, C) in order of first occurrence, and the index (N,) of each row among them."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return rows[first[order]], place[inverse.ravel()]


def _joined_images(parts: list[_Part]) -> tuple[Images, np.ndarray | None, str]:
    """Merged images, corner coordinates (F, 3, 2) or None, and a description as in :attr:`LoadedMesh.uv_changes`."""
    first = parts[0].images
    changes = "were moved into [0, 1], because they repeat the image" if any(part.uvs_moved for part in parts) else ""
    if all(part.images is first or _equal(part.images, first) for part in parts):
        without = sum(part.corner_uvs is None for part in parts)
        if without:
            lost = f"were left out: {without} of its {len(parts)} objects have none" if without < len(parts) else ""
            return first, None, lost
        return first, np.concatenate([part.corner_uvs for part in parts if part.corner_uvs is not None]), changes
    filled = [np.full((len(p.faces), 3, 2), 0.5) if p.corner_uvs is None else p.corner_uvs for p in parts]
    # The coordinates of a constant material may be arbitrary, and all points of its cell have the same color.
    inside = [uvs if part.images.need_uvs else np.full_like(uvs, 0.5) for part, uvs in zip(parts, filled, strict=True)]
    placed, images = join(inside, [_with_mean_color(part, parts) for part in parts])
    changes = f"were moved into an atlas, because its {len(parts)} objects have different images"
    return images, np.concatenate(placed), changes


def _with_mean_color(part: _Part, parts: list[_Part]) -> Images:
    """Images of a part; one with only vertex colors gets the mean of its colors if other parts have color images."""
    if (
        part.images.base_color is None
        and part.colors is not None
        and any(p.images.base_color is not None for p in parts)
    ):
        mean = np.round(part.colors.mean(axis=0)).astype(np.uint8)
        return replace(part.images, base_color=mean.reshape(1, 1, 3))
    return part.images


def _equal(one: Images, other: Images) -> bool:
    a, b = one.named(), other.named()
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def _joined_colors(parts: list[_Part], merged: np.ndarray, count: int) -> np.ndarray | None:
    """Colors (V, 3) of the merged vertices; white for parts without colors."""
    if all(part.colors is None for part in parts):
        return None
    white = [np.full((len(p.vertices), 3), 255, np.uint8) if p.colors is None else p.colors for p in parts]
    colors = np.empty((count, 3), dtype=np.uint8)
    colors[merged] = np.concatenate(white)
    return colors


def _up_of(path: Path) -> Literal["y", "z"]:
    with path.open("rb") as file:
        start = file.read(512).lower()
    said = {axis: start.find(f"{axis} up".encode()) for axis in ("y", "z")}
    suffix = path.suffix.lower()
    if suffix in (".obj", ".ply", ".stl") and max(said.values()) >= 0:
        return "y" if said["z"] < 0 or 0 <= said["y"] < said["z"] else "z"
    return "z" if suffix in (".ply", ".stl") else "y"
