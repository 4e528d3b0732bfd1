"""Texture baking: the object's surface channels at the surface point of every texel."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from scoredist3d.export.unseen import SeenSurface, SurfaceSamples
from scoredist3d.meshes.exportable import Exportable, Progress, query_channels
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.occlusion import ambient_occlusion
from scoredist3d.meshes.tangents import corner_tangents
from scoredist3d.meshes.texels import Texels, fill_uncovered, rasterize, texel_points

_FROM_TRAINING = ("base_color", "roughness", "metallic")
_LEAST_NORMAL_Z = 0.05  # a normal map cannot store normals that point into the surface


@dataclass(frozen=True)
class Textures:
    """Square uint8 textures of one mesh with row 0 at the top; ``None`` for channels that the object does not have.

    Attributes:
        base_color: (S, S, 3), display sRGB, as in the base color texture of glTF.
        roughness: (S, S), linear.
        metallic: (S, S), linear.
        occlusion: (S, S), linear.
        normal: (S, S, 3), tangent space (see :mod:`scoredist3d.meshes.tangents`), linear, green along +v.
        covered: (S, S) bool, texels on the mesh; the others only continue them. None if unknown. This is not a channel.
        filled: Share, in [0, 1], of the covered texels with diffused values, because no training camera sees them; None
            if this was not examined.
    """

    base_color: np.ndarray
    roughness: np.ndarray | None = None
    metallic: np.ndarray | None = None
    occlusion: np.ndarray | None = None
    normal: np.ndarray | None = None
    covered: np.ndarray | None = None
    filled: float | None = None

    def named(self) -> dict[str, np.ndarray]:
        """The channels that the object has, by name."""
        images = {name: image for name, image in vars(self).items() if isinstance(image, np.ndarray)}
        images.pop("covered", None)
        return images

    @property
    def clipped_share(self) -> float | None:
        """Share, in [0, 1], of the covered texels whose base color has a channel at 0 or 255; None if unknown."""
        if self.covered is None:
            return None
        colors = self.base_color[self.covered]
        return float(((colors == 0) | (colors == 255)).any(axis=1).mean())

    @property
    def has_surface(self) -> bool:
        """Whether there is a roughness or metallic texture."""
        return self.roughness is not None or self.metallic is not None


def bake_textures(
    shape: Exportable,
    mesh: Mesh,
    size: int,
    *,
    detail: Mesh | None = None,
    normals: bool = True,
    occlusion: bool = False,
    seen: SeenSurface | None = None,
    chunk: int = 131072,
    progress: Progress | None = None,
) -> Textures:
    """Bake all channels of an object into the textures of an unwrapped mesh.

    Texels outside all faces get the value of the nearest baked texel, so that mipmaps show no seams.

    Args:
        shape: The object; it is queried once per covered texel.
        mesh: Mesh with texture coordinates.
        size: Side length of the square textures, in texels.
        detail: The surface before simplification. Its normals, modified by the object's shading normals, become the
            normal map. Without it, a normal map is baked only if the object has shading normals.
        normals: Whether to bake a normal map.
        occlusion: Whether to bake ambient occlusion if the object does not provide it.
        seen: What the training cameras see of the mesh. Colors, roughness and metal of the other parts are diffused
            from there, and their normals are those of the surface. Without it, all values are the object's own.
        chunk: Points per query.
        progress: Callback that receives the fraction of texels queried so far.

    Raises:
        ValueError: The mesh has no texture coordinates, or the object has invalid values.
    """
    texels = rasterize(mesh, size)
    points = texel_points(mesh, texels)
    smooth = _smooth_normals(mesh, texels)
    own = normals_of(detail, points) if detail is not None and normals else None
    normal = smooth if own is None else own
    found = query_channels(shape, points, normal, chunk=chunk, progress=progress)
    samples = None if seen is None else seen.at(texels.face, texels.barycentric)
    if samples is not None:
        found = _fill_unseen(found, samples, normal)
    world = found.pop("normal", own)
    if occlusion and "occlusion" not in found:
        found["occlusion"] = ambient_occlusion(mesh, points, smooth)
    if world is not None and normals:
        found["normal"] = 0.5 + 0.5 * _into_tangent_space(mesh, texels, world)
    textures = _filled({name: quantize(values) for name, values in found.items()}, texels, size)
    return textures if samples is None else replace(textures, filled=samples.filled_share)


def _fill_unseen(found: dict[str, np.ndarray], samples: SurfaceSamples, normals: np.ndarray) -> dict[str, np.ndarray]:
    """The channels with diffused values where the surface is not seen, and with ``normals`` (M, 3) there."""
    names = [name for name in _FROM_TRAINING if name in found]
    columns = samples.fill(np.concatenate([found[name].reshape(len(normals), -1) for name in names], axis=1))
    parts = np.split(columns, np.cumsum([found[name][:1].size for name in names])[:-1], axis=1)
    result = found | {name: part.reshape(found[name].shape) for name, part in zip(names, parts, strict=True)}
    if "normal" in found:
        share, own = samples.confidence[:, None], found["normal"]
        result["normal"] = np.where(share == 1.0, own, _unit(share * own + (1.0 - share) * normals))
    return result


def quantize(values: np.ndarray) -> np.ndarray:
    """Round values in [0, 1] to uint8."""
    return (values * 255.0 + 0.5).astype(np.uint8)


def normals_of(surface: Mesh, points: np.ndarray) -> np.ndarray:
    """Unit normals (N, 3) of a surface at its points closest to (N, 3) ``points``."""
    from scoredist3d.ops.mesh.distance import closest_point

    vertices, faces = torch.from_numpy(surface.vertices), torch.from_numpy(surface.faces)
    found = closest_point(torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)), vertices, faces)
    corners = surface.vertex_normals()[surface.faces[found.faces.numpy()]]
    return _unit(np.einsum("nk,nkc->nc", found.barycentric.numpy(), corners))


def _smooth_normals(mesh: Mesh, texels: Texels) -> np.ndarray:
    """Interpolated vertex normals (M, 3), which viewers use to shade the mesh."""
    corners = mesh.vertex_normals()[mesh.faces[texels.face]]
    return _unit(np.einsum("mk,mkc->mc", texels.barycentric, corners)).astype(np.float32)


def _into_tangent_space(mesh: Mesh, texels: Texels, world: np.ndarray) -> np.ndarray:
    """World normals (M, 3) in the tangent frame that viewers reconstruct at each texel."""
    normal = _smooth_normals(mesh, texels)
    corners = corner_tangents(mesh)[texels.face]
    tangent = np.einsum("mk,mkc->mc", texels.barycentric, corners[..., :3])
    tangent = _unit(tangent - (tangent * normal).sum(axis=1, keepdims=True) * normal)
    bitangent = corners[:, 0, 3:] * np.cross(normal, tangent)
    local = np.stack([(world * axis).sum(axis=1) for axis in (tangent, bitangent, normal)], axis=1)
    local[:, 2] = np.maximum(local[:, 2], _LEAST_NORMAL_Z)
    return _unit(local)


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _filled(values: dict[str, np.ndarray], texels: Texels, size: int) -> Textures:
    """Textures from the values at the covered texels; other texels take the values of the nearest covered one."""
    names = [field.name for field in fields(Textures) if field.name in values]
    columns = np.concatenate([values[name].reshape(len(texels.index), -1) for name in names], axis=1)
    sheet = np.zeros((size * size, columns.shape[1]), dtype=np.uint8)
    sheet[texels.index] = columns
    image = fill_uncovered(sheet.reshape(size, size, -1), texels.index)
    images: dict[str, Any] = {}
    start = 0
    for name in names:
        width = 1 if values[name].ndim == 1 else values[name].shape[1]
        part = image[..., start : start + width]
        images[name] = np.ascontiguousarray(part[..., 0] if values[name].ndim == 1 else part)
        start += width
    return Textures(**images, covered=texels.mask(size))
