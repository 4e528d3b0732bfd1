"""Reading of mesh files by trimesh, within limits, and without access to files outside of the folder of the mesh."""

from __future__ import annotations

import json
import logging
import re
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from scoredist3d.limits import MAX_FACES, MAX_MESH_BYTES, check_file_size
from scoredist3d.meshes.image_files import checked_image_opening, converted_image, decode_image

logger = logging.getLogger(__name__)

_HEADER_BYTES = 65536
_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_GLB_HEADER = 20  # bytes


class MeshFolder:
    """The files that a mesh may refer to: those in its folder and in the folders below.

    It is passed to trimesh as its resolver. Images that cannot be used are logged and ignored, once for each reason.

    Attributes:
        mesh: The mesh file.
    """

    def __init__(self, mesh: Path) -> None:
        self.mesh = mesh
        self._folder = mesh.parent.resolve()
        self._reported: set[str] = set()

    @property
    def file_name(self) -> str:
        """Name of the mesh file, which trimesh reads."""
        return self.mesh.name

    def find(self, name: str) -> Path:
        """The existing file that a mesh, material or glTF file names.

        As in trimesh, a file next to the mesh is used for a name with another folder, since material files often
        contain the absolute paths of the computer on which they were made.

        Raises:
            ValueError: The file does not exist, or is outside of the folder of the mesh.
        """
        plain = unquote(name) if self.mesh.suffix.lower() in (".glb", ".gltf") else name
        plain = plain.strip().replace("\\", "/")
        inside = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", plain) is None  # a URI such as file:///
        for candidate in (plain, plain.rsplit("/", 1)[-1]) if inside else ():
            try:
                path = (self._folder / candidate).resolve()
                if path.is_relative_to(self._folder):
                    if path.is_file():
                        return path
                elif candidate == plain:
                    inside = False
            except (OSError, ValueError, RuntimeError):  # names with null bytes, loops of links
                continue
        if inside:
            raise ValueError(f"{name} does not exist")
        raise ValueError(f"{name} is outside of the folder of the mesh; copy it next to {self.mesh.name}")

    def get(self, name: str) -> bytes:
        """The content of a file; see :meth:`find`."""
        try:
            path = self.find(name)
            check_file_size(path, MAX_MESH_BYTES, "a file that belongs to a mesh")
        except ValueError as error:
            self.report(f"the file {error}")
            raise
        return path.read_bytes()

    __getitem__ = get

    def report(self, reason: str) -> None:
        """Log that a texture image or material is ignored."""
        if reason not in self._reported:
            self._reported.add(reason)
            logger.warning("%s: a texture image or material is ignored: %s", self.mesh.name, reason)

    def pixels(self, image: Image.Image | str | None, mode: str) -> np.ndarray | None:
        """Pixels of an open image, or of the image file of a name; None if there is none or it cannot be used."""
        if image is None:
            return None
        name = image if isinstance(image, str) else None
        try:
            if isinstance(image, str):
                path = self.find(image)
                return np.array(decode_image(path, mode))
            return np.array(converted_image(image, mode))
        except ValueError as error:
            text = str(error)
            self.report(text if name is None or text.startswith(name) else f"{name}: {text}")
            return None


def read_scene(path: Path) -> tuple[list[tuple[Any, np.ndarray]], MeshFolder]:
    """All meshes in a file, each with its 4 x 4 transform from object to scene coordinates, and the folder of the file.

    Raises:
        ValueError: The file cannot be parsed, or is larger than the limits of :mod:`scoredist3d.limits`.
    """
    import trimesh

    folder, suffix = MeshFolder(path), path.suffix.lower()
    check_file_size(path, MAX_MESH_BYTES, "a mesh")
    resolver: Any = folder
    options: dict[str, Any] = {"merge_primitives": False} if suffix in (".glb", ".gltf") else {}
    try:
        _check_declared_sizes(path)
        with checked_image_opening(folder.report):
            scene = trimesh.load_scene(path, process=False, resolver=resolver, **options)
    except Exception as error:  # third-party parsers raise many types of exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, IndexError):
            reason = f"it refers to vertices or other values that it does not contain ({reason})"
        raise ValueError(f"cannot read {path.name} as a {suffix} file: {reason}") from error
    found, faces = [], 0
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if isinstance(geometry, trimesh.Trimesh):
            faces += len(geometry.faces)
            if faces > MAX_FACES:
                raise ValueError(f"{path.name} has more than {MAX_FACES:,} triangles: simplify it first")
            found.append((geometry, np.asarray(transform, dtype=np.float64)))
    return found, folder


def check_geometry(path: Path, vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray | None) -> None:
    """Check the values of an object, as float32 and before they are used as indices.

    Raises:
        ValueError: A face refers to a vertex that does not exist, or a coordinate is not finite.
    """
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"{path.name} has faces with the vertices {faces.min()} to {faces.max()}, but the vertices 0 to "
            f"{len(vertices) - 1}: repair the file first"
        )
    for values, what in ((vertices, "vertex"), (uvs, "texture")):
        if values is not None and not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise ValueError(f"{path.name} has {what} coordinates that are not finite: repair the file first")


def _check_declared_sizes(path: Path) -> None:
    """Check the numbers in the header of a file against its length, before memory is allocated for them."""
    suffix = path.suffix.lower()
    if suffix == ".ply":
        _check_ply(path)
    elif suffix in (".glb", ".gltf"):
        _check_gltf(_gltf_json(path))


def _check_ply(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES).split(b"end_header")[0]
    for name, digits in re.findall(rb"^\s*element\s+(\S+)\s+(\d+)\s*$", head, flags=re.MULTILINE):
        count, size = int(digits[:30]), path.stat().st_size
        if name == b"face" and count > MAX_FACES:
            raise ValueError(f"it has {count:,} faces, and a mesh may have at most {MAX_FACES:,}: simplify it first")
        if count > size:  # an element has at least one byte
            raise ValueError(f"its header declares {count:,} elements {name.decode()!r}, but it has {size:,} bytes")


def _gltf_json(path: Path) -> Any:
    if path.suffix.lower() == ".gltf":
        return json.loads(path.read_bytes())
    with path.open("rb") as file:
        head = file.read(_GLB_HEADER)
        if len(head) < _GLB_HEADER:
            raise ValueError("it is truncated")
        length = struct.unpack("<I", head[12:16])[0]
        if length > path.stat().st_size:
            raise ValueError("it is truncated")
        return json.loads(file.read(length))


def _check_gltf(document: Any) -> None:
    """Check the sizes of accessors without data, whose zeros trimesh allocates."""
    empty = [accessor for accessor in document.get("accessors", []) if "bufferView" not in accessor]
    size = sum(4 * int(accessor["count"]) * _COMPONENTS[accessor["type"]] for accessor in empty)
    if size > MAX_MESH_BYTES:
        raise ValueError(f"it declares {size:,} bytes of values without data")
