"""GLB: one textured mesh as binary glTF 2.0, y up, in meters."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from scoredist3d import __version__
from scoredist3d.export.bake import Textures
from scoredist3d.export.formats.base import register_format
from scoredist3d.export.products import TexturedProduct
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.tangents import corner_tangents, frame_groups

_FLOAT, _UNSIGNED_SHORT, _UNSIGNED_INT = 5126, 5123, 5125
_ARRAY_BUFFER, _ELEMENT_ARRAY_BUFFER = 34962, 34963
_LINEAR, _LINEAR_MIPMAP_LINEAR = 9729, 9987


def split_seams(mesh: Mesh, *, tangents: bool = False) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Split the vertices of a mesh at the seams of its texture coordinates.

    The result has one vertex per pair of vertex and texture coordinate, and with ``tangents`` also per handedness of
    the tangent frame. Normals are those of the closed surface, so shading does not show the seams.

    Returns:
        Vertex attributes by glTF name, in world axes: POSITION (N, 3), NORMAL (N, 3), TEXCOORD_0 (N, 2) with the origin
        at the bottom left, and with ``tangents`` TANGENT (N, 4); and the faces (F, 3).

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    if mesh.uvs is None or mesh.uv_faces is None:
        raise ValueError("the mesh has no texture coordinates: unwrap it first")
    frames = corner_tangents(mesh) if tangents else None
    sign = np.ones(len(mesh.faces)) if frames is None else frames[:, 0, 3]
    _, first, group = np.unique(frame_groups(mesh, sign), return_index=True, return_inverse=True)
    vertex = mesh.faces.ravel()[first]
    attributes = {
        "POSITION": mesh.vertices[vertex],
        "NORMAL": mesh.vertex_normals()[vertex],
        "TEXCOORD_0": mesh.uvs[mesh.uv_faces.ravel()[first]],
    }
    if frames is not None:
        attributes["TANGENT"] = frames.reshape(-1, 4)[first]
    return attributes, group.reshape(-1, 3)


@register_format(
    "glb",
    suffix=".glb",
    needs=TexturedProduct,
    summary="Binary glTF 2.0 with the baked textures, y up, in meters.",
    has_unlit=True,
)
def write_glb(path: Path, product: TexturedProduct) -> list[Path]:
    """Write a binary glTF file with one mesh and one metallic-roughness material, both named after the file.

    The base color texture is sRGB. Occlusion, roughness and metallic share one linear texture (red, green, blue). A
    normal map is accompanied by tangents. Without roughness and metallic textures the material is fully rough and not
    metallic. An unlit mesh declares ``KHR_materials_unlit``; viewers without that extension fall back to the material.

    Raises:
        ValueError: The mesh has no texture coordinates.
    """
    textures, name = product.textures, path.stem
    attributes, faces = split_seams(product.mesh, tangents=textures.normal is not None)
    frame = product.frame.y_up
    attributes["POSITION"] = frame.points(attributes["POSITION"])
    attributes["NORMAL"] = frame.directions(attributes["NORMAL"])
    attributes["TEXCOORD_0"] = attributes["TEXCOORD_0"] * np.array([1, -1], np.float32) + np.array([0, 1], np.float32)
    if "TANGENT" in attributes:
        tangent = attributes["TANGENT"]
        attributes["TANGENT"] = np.concatenate([frame.directions(tangent[:, :3]), tangent[:, 3:]], axis=1)
    file = _GlbBuilder()
    primitive = {
        "attributes": {key: file.vertices(key, values) for key, values in attributes.items()},
        "indices": file.indices(faces, len(attributes["POSITION"])),
        "material": 0,
        "mode": 4,
    }
    file.document["meshes"] = [{"name": name, "primitives": [primitive]}]
    file.document["nodes"] = [{"name": name, "mesh": 0}]
    file.document["materials"] = [_material(file, textures, name, product.double_sided)]
    if product.unlit:
        file.document["extensionsUsed"] = ["KHR_materials_unlit"]
        file.document["materials"][0]["extensions"] = {"KHR_materials_unlit": {}}
    path.write_bytes(file.glb())
    return [path]


def packed_surface(textures: Textures) -> np.ndarray | None:
    """Occlusion, roughness and metallic packed into the channels of one (S, S, 3) image.

    A missing map gets its neutral value; the result is None if all three are missing.
    """
    maps = (textures.occlusion, textures.roughness, textures.metallic)
    if all(image is None for image in maps):
        return None
    neutral = (255, 255, 0)
    shape = textures.base_color.shape[:2]
    pairs = zip(maps, neutral, strict=True)
    return np.stack([np.full(shape, value, np.uint8) if image is None else image for image, value in pairs], axis=2)


def _material(file: _GlbBuilder, textures: Textures, name: str, double_sided: bool) -> dict[str, Any]:
    surface: dict[str, Any] = {
        "baseColorTexture": {"index": file.texture(textures.base_color)},
        "metallicFactor": 0.0,
        "roughnessFactor": 1.0,
    }
    material: dict[str, Any] = {"name": name, "pbrMetallicRoughness": surface, "doubleSided": double_sided}
    packed = packed_surface(textures)
    if packed is not None:
        index = file.texture(packed)
        if textures.has_surface:
            surface["metallicRoughnessTexture"] = {"index": index}
            surface["metallicFactor"] = 1.0
        if textures.occlusion is not None:
            material["occlusionTexture"] = {"index": index}
    if textures.normal is not None:
        material["normalTexture"] = {"index": file.texture(textures.normal)}
    return material


class _GlbBuilder:
    """Builder of a GLB file: collects its JSON document and its binary chunk."""

    def __init__(self) -> None:
        self.document: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": f"scoredist3d {__version__}"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "accessors": [],
            "bufferViews": [],
        }
        self.data = bytearray()

    def vertices(self, attribute: str, values: np.ndarray) -> int:
        """Add an accessor of (N, C) float32 vertex data and return its index."""
        values = np.ascontiguousarray(values, dtype="<f4")
        accessor: dict[str, Any] = {
            "bufferView": self._view(values.tobytes(), _ARRAY_BUFFER),
            "componentType": _FLOAT,
            "count": len(values),
            "type": f"VEC{values.shape[1]}",
        }
        if attribute == "POSITION":  # the only attribute for which glTF requires bounds
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        return self._append("accessors", accessor)

    def indices(self, faces: np.ndarray, count: int) -> int:
        """Add an accessor of (F, 3) faces over ``count`` vertices and return its index."""
        kind, code = ("<u2", _UNSIGNED_SHORT) if count < 65535 else ("<u4", _UNSIGNED_INT)
        view = self._view(faces.astype(kind).tobytes(), _ELEMENT_ARRAY_BUFFER)
        return self._append(
            "accessors", {"bufferView": view, "componentType": code, "count": faces.size, "type": "SCALAR"}
        )

    def texture(self, image: np.ndarray) -> int:
        """Add a uint8 image as a PNG texture and return its index."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        source = self._append("images", {"mimeType": "image/png", "bufferView": self._view(buffer.getvalue())})
        self.document["samplers"] = [{"magFilter": _LINEAR, "minFilter": _LINEAR_MIPMAP_LINEAR}]
        return self._append("textures", {"source": source, "sampler": 0})

    def glb(self) -> bytes:
        """Contents of the GLB file."""
        self.document["buffers"] = [{"byteLength": len(self.data)}]
        text = json.dumps(self.document, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 4)
        binary = bytes(self.data) + b"\0" * (-len(self.data) % 4)
        chunks = b"".join(
            struct.pack("<I4s", len(chunk), kind) + chunk for kind, chunk in ((b"JSON", text), (b"BIN\0", binary))
        )
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks

    def _view(self, data: bytes, target: int | None = None) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data)}
        self.data += data
        return self._append("bufferViews", view if target is None else view | {"target": target})

    def _append(self, key: str, item: dict[str, Any]) -> int:
        items: list[dict[str, Any]] = self.document.setdefault(key, [])
        items.append(item)
        return len(items) - 1
