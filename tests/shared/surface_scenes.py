"""Small surfaces with known shapes and looks, and the cameras to see them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.base import Surface, SurfaceMesh, SurfacePoints
from scoredist3d.meshes.mesh import Mesh

# Corner k of the cube is at the signs of its bits (x, y, z); faces +x, -x, +y, -y, +z, -z, seen from outside.
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float32)
SIDES = ((4, 6, 7, 5), (2, 0, 1, 3), (6, 2, 3, 7), (0, 4, 5, 1), (1, 5, 7, 3), (2, 6, 4, 0))
SIDE_COLORS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40], [40, 200, 200], [200, 40, 200]])


def build(kind: str, name: str, runtime: dict[str, Any] | None = None, **options: Any) -> Any:
    return registry.build(parse_component(kind, {"type": name, **options}), **(runtime or {}))


def renderer_of(geometry: Surface, *, material: Any = None, background: Any = None, **options: Any) -> Any:
    parts = {
        "geometry": geometry,
        "material": material or build("material", "unlit"),
        "background": background or build("background", "solid", color=[0.0, 0.0, 0.0]),
    }
    return build("renderer", "mesh-rasterizer", parts, **options)


def views(
    *azimuths: float, size: int = 64, elevation: float = 0.0, distance: float = 3.0, fovy: float = 40.0
) -> Cameras:
    azimuth = torch.tensor(azimuths)
    ones = torch.ones_like(azimuth)
    return orbit(azimuth, elevation * ones, distance * ones, fovy * ones, size, size)


def around(count: int = 6, size: int = 64) -> Cameras:
    """Views from all sides, above and below."""
    azimuth = torch.arange(count) * (360.0 / count)
    elevation = torch.tensor([30.0, -30.0, 70.0, -70.0] * count)[:count]
    ones = torch.ones(count)
    return orbit(azimuth, elevation, 3.0 * ones, 40.0 * ones, size, size)


def cube(half: float = 0.5) -> Mesh:
    """A closed cube whose sides each have a cell of their own in a texture of 3 x 2 cells."""
    faces, uvs, uv_faces = [], [], []
    for side, (a, b, c, d) in enumerate(SIDES):
        column, row = side % 3, side // 3
        low, high = np.array([column, row]) + 0.1, np.array([column, row]) + 0.9
        first = len(uvs)
        uvs += [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
        faces += [(a, b, c), (a, c, d)]
        uv_faces += [(first, first + 1, first + 2), (first, first + 2, first + 3)]
    scaled = np.array(uvs, dtype=np.float32) / np.array([3, 2], dtype=np.float32)
    return Mesh(half * CORNERS, np.array(faces), uvs=scaled, uv_faces=np.array(uv_faces))


def write_cube(folder: Path, half: float = 0.5) -> Path:
    """The cube as an OBJ file, z up, with a texture of one colour per side."""
    mesh = cube(half)
    assert mesh.uvs is not None and mesh.uv_faces is not None
    texture = np.zeros((64, 96, 3), dtype=np.uint8)
    for side, color in enumerate(SIDE_COLORS):
        column, row = side % 3, 1 - side // 3  # the image's first row is the top one
        texture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = color
    Image.fromarray(texture).save(folder / "cube.png")
    (folder / "cube.mtl").write_text("newmtl paint\nmap_Kd cube.png\n", encoding="utf-8")
    lines = ["# z up", "mtllib cube.mtl", "usemtl paint"]
    lines += [f"v {x} {y} {z}" for x, y, z in mesh.vertices]
    lines += [f"vt {u} {v}" for u, v in mesh.uvs]
    for corners, places in zip(mesh.faces + 1, mesh.uv_faces + 1, strict=True):
        lines.append("f " + " ".join(f"{c}/{p}" for c, p in zip(corners, places, strict=True)))
    path = folder / "cube.obj"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def icosphere(radius: float, subdivisions: int = 3) -> Mesh:
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return Mesh(np.asarray(ball.vertices, dtype=np.float32), np.asarray(ball.faces, dtype=np.int64))


class FixedMesh(Surface):
    """A given mesh whose vertices are parameters; its features are ``feature``'s, or constant."""

    def __init__(self, mesh: Mesh, feature: Any = None, *, num_features: int = 3, radius: float = 1.0) -> None:
        super().__init__(Surface.Config(radius=radius))
        self.num_features, self.feature = num_features, feature
        self.vertices = nn.Parameter(torch.from_numpy(mesh.vertices))
        self.register_buffer("faces", torch.from_numpy(mesh.faces))
        self.mesh = mesh

    def forward(self) -> SurfaceMesh:
        uvs = None if self.mesh.uvs is None else torch.from_numpy(self.mesh.uvs)
        uv_faces = None if self.mesh.uv_faces is None else torch.from_numpy(self.mesh.uv_faces)
        return SurfaceMesh(self.vertices, self.faces, uvs, uv_faces, fixed_topology=True)  # type: ignore[arg-type]

    def features(self, points: SurfacePoints) -> Tensor:
        if self.feature is None:
            return points.points.new_zeros(len(points.points), self.num_features)
        found: Tensor = self.feature(points)
        return found

    def features_at(self, points: Tensor) -> Tensor:
        return self.features(SurfacePoints(points))

    def density(self, points: Tensor) -> Tensor:
        return points.new_zeros(len(points))
