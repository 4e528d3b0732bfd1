#!/usr/bin/env python
"""Does an exported file look like the object? Exports of known objects, seen through another renderer.

    python benchmarks/export_quality.py
    python benchmarks/export_quality.py --views 8 --size 256 exporter.texture_size=2048

Each object is a signed distance and a color in closed form. Its GLB is read by trimesh and rendered by the small ray
caster below, which shares no code with the package: PSNR is against the object's own views (sphere tracing of the
distance), over a white background. The Chamfer distance is the mean distance of points of the file to the true surface
and of points of the true surface to the file, in scene units (the ball's radius is 1). Exits with 1 where a PSNR is
below 30 dB.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np
import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.meshes.exportable import SurfaceChannels

LEAST_PSNR = 30.0
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Known:
    """An object in closed form, as exporters see it: a density that falls off across the surface."""

    sdf: Function
    color: Function
    radius: float = 1.0
    iso_level: float = 1.0
    baked_lighting: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def density(self, points: Tensor) -> Tensor:
        return torch.exp((-100.0 * self.sdf(points)).clamp(-40.0, 40.0))

    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        return SurfaceChannels(self.color(points))

    def surface(self) -> None:
        return None

    def splats(self) -> None:
        return None


def smooth_color(points: Tensor) -> Tensor:
    return 0.5 + 0.45 * torch.sin(3.0 * points + points.new_tensor([0.3, 1.1, 2.3]))


def check_color(points: Tensor) -> Tensor:
    """Cells of 0.2 with soft edges, two colors."""
    wave = torch.sin(points * (math.pi / 0.2) + 0.4).prod(dim=1, keepdim=True)
    share = torch.sigmoid(20.0 * wave)
    return share * points.new_tensor([0.9, 0.2, 0.1]) + (1 - share) * points.new_tensor([0.1, 0.3, 0.8])


def torus(major: float, minor: float) -> Function:
    return lambda p: torch.hypot(torch.hypot(p[:, 0], p[:, 1]) - major, p[:, 2]) - minor


def rounded_box(half: tuple[float, float, float], rounding: float) -> Function:
    def sdf(points: Tensor) -> Tensor:
        q = points.abs() - (points.new_tensor(half) - rounding)
        return q.clamp_min(0).norm(dim=1) + q.max(dim=1).values.clamp_max(0) - rounding

    return sdf


def capsule(start: tuple[float, float, float], end: tuple[float, float, float], radius: float) -> Function:
    def sdf(points: Tensor) -> Tensor:
        a, b = points.new_tensor(start), points.new_tensor(end)
        along = ((points - a) @ (b - a) / (b - a).dot(b - a)).clamp(0, 1)
        return (points - a - along[:, None] * (b - a)).norm(dim=1) - radius

    return sdf


def union(*parts: Function) -> Function:
    return lambda p: torch.stack([part(p) for part in parts]).min(dim=0).values


OBJECTS = {
    "smooth torus": Known(torus(0.55, 0.22), smooth_color),
    "checked torus": Known(torus(0.55, 0.22), check_color),
    "checked box": Known(rounded_box((0.5, 0.35, 0.45), 0.05), check_color),
    "table": Known(
        union(
            rounded_box((0.6, 0.6, 0.08), 0.04),
            *(capsule((x, y, 0.0), (x, y, -0.5), 0.08) for x in (-0.4, 0.4) for y in (-0.4, 0.4)),
        ),
        smooth_color,
    ),
}


def own_view(known: Known, camera: Cameras) -> np.ndarray:
    """(H, W, 3) the object by sphere tracing, over white."""
    rays = camera.rays()
    origins, directions = rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3)
    depth, active = torch.zeros(len(origins)), torch.arange(len(origins))
    for _ in range(256):
        points = origins[active] + depth[active, None] * directions[active]
        distance = known.sdf(points)
        depth[active] += distance
        # Rays that have arrived or left the ball on its far side stop.
        active = active[(distance.abs() > 1e-5) & (depth[active] < origins[active].norm(dim=1) + 1.0)]
    points = origins + depth[:, None] * directions
    hit = (known.sdf(points).abs() < 2e-4) & (points.norm(dim=1) < 2.0)
    colors = torch.where(hit[:, None], known.color(points), torch.ones(3))
    return colors.reshape(camera.height, camera.width, 3).numpy()


@dataclass(frozen=True)
class Textured:
    """A file as trimesh gives it, turned into our world."""

    triangles: np.ndarray  # (F, 3, 3)
    uvs: np.ndarray  # (F, 3, 2), origin at the bottom left
    texture: np.ndarray  # (H, W, 3) in [0, 1]

    @classmethod
    def load(cls, path: Path) -> Textured:
        import trimesh

        geometry: Any = trimesh.load(path, force="mesh", process=False)
        vertices = np.asarray(geometry.vertices)[:, [2, 0, 1]]
        image = geometry.visual.material.baseColorTexture.convert("RGB")
        return cls(vertices[geometry.faces], geometry.visual.uv[geometry.faces], np.asarray(image) / 255.0)

    def view(self, camera: Cameras) -> np.ndarray:
        """(H, W, 3) over white: of each pixel the nearest intersection (Moeller and Trumbore 1997) and its texel."""
        rays = camera.rays()
        eye = rays.origins[0, 0, 0].double().numpy()
        directions = rays.directions.reshape(-1, 3).double().numpy()
        pixel, face = self._candidates(camera)
        a, b, c = (self.triangles[face, k] for k in range(3))
        edge1, edge2, ray = b - a, c - a, directions[pixel]
        across = np.cross(ray, edge2)
        determinant = (edge1 * across).sum(axis=1)
        safe = np.where(np.abs(determinant) < 1e-18, 1.0, determinant)
        offset = eye - a
        u = (offset * across).sum(axis=1) / safe
        turned = np.cross(offset, edge1)
        v = (ray * turned).sum(axis=1) / safe
        depth = (edge2 * turned).sum(axis=1) / safe
        # The file is single-sided: only front faces count, a hair beyond their edges.
        hit = (determinant > 1e-18) & (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9) & (depth > 0)
        order = np.flatnonzero(hit)[np.argsort(-depth[hit], kind="stable")]
        nearest = np.full(len(directions), -1)
        nearest[pixel[order]] = order  # the last assignment, the nearest, stays
        image, seen = np.ones((len(directions), 3)), np.flatnonzero(nearest >= 0)
        chosen = nearest[seen]
        weights = np.stack([1 - u - v, u, v], axis=1)[chosen]
        image[seen] = self._texels(np.einsum("nk,nkc->nc", weights, self.uvs[face[chosen]]))
        return image.reshape(camera.height, camera.width, 3)

    def _candidates(self, camera: Cameras) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and the faces whose bounding boxes hold them."""
        height, width = camera.height, camera.width
        w2c = np.linalg.inv(camera.c2w[0].double().numpy())
        local = self.triangles @ w2c[:3, :3].T + w2c[:3, 3]
        focal = 0.5 * height / math.tan(0.5 * float(camera.fovy[0]))
        x = 0.5 * width + focal * local[..., 0] / -local[..., 2]
        y = 0.5 * height - focal * local[..., 1] / -local[..., 2]
        left, right = x.min(axis=1).astype(int).clip(0, width), (x.max(axis=1) + 1).astype(int).clip(0, width)
        top, bottom = y.min(axis=1).astype(int).clip(0, height), (y.max(axis=1) + 1).astype(int).clip(0, height)
        columns = right - left
        counts = columns * (bottom - top)
        face = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
        row, column = top[face] + place // columns[face], left[face] + place % columns[face]
        return row * width + column, face

    def _texels(self, uv: np.ndarray) -> np.ndarray:
        height, width = self.texture.shape[:2]
        x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
        column, row = np.floor(x).astype(int), np.floor(y).astype(int)
        fx, fy = (x - column)[:, None], (y - row)[:, None]
        at = lambda i, j: self.texture[i.clip(0, height - 1), j.clip(0, width - 1)]  # noqa: E731
        upper = at(row, column) * (1 - fx) + at(row, column + 1) * fx
        lower = at(row + 1, column) * (1 - fx) + at(row + 1, column + 1) * fx
        return upper * (1 - fy) + lower * fy

    def sampled(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count, 3) points, evenly over the area."""
        edges = self.triangles[:, 1:] - self.triangles[:, :1]
        areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
        face = rng.choice(len(areas), count, p=areas / areas.sum())
        return np.einsum("nk,nkc->nc", rng.dirichlet((1.0, 1.0, 1.0), count), self.triangles[face])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10.0 * math.log10(max(float(((one - other) ** 2).mean()), 1e-12)))


def chamfer(known: Known, file: Textured, count: int = 20000) -> float:
    """Mean of both directions, scene units."""
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    there = known.sdf(torch.from_numpy(file.sampled(count, rng)).float()).abs().mean()
    # Points near the surface, walked onto it along the gradient.
    points = torch.from_numpy(rng.uniform(-1, 1, (20 * count, 3))).float()
    points = points[known.sdf(points).abs() < 0.1][:count].requires_grad_(True)
    for _ in range(8):
        distance = known.sdf(points)
        (gradient,) = torch.autograd.grad(distance.sum(), points)
        points = (points - distance[:, None] * gradient).detach().requires_grad_(True)
    spacing = file.sampled(20 * count, rng)
    # The distance to the nearest of many samples overestimates the one to the surface by less than their spacing.
    back, _ = cKDTree(spacing).query(points.detach().numpy())
    return 0.5 * (float(there) + float(back.mean()))


@dataclass(frozen=True)
class Result:
    """Of one object: worst and mean PSNR over the views, Chamfer distance, faces, seconds of the export."""

    worst: float
    mean: float
    chamfer: float
    faces: int
    seconds: float


def measure(known: Known, options: dict[str, Any], *, views: int = 4, size: int = 128) -> Result:
    """Export, read, render and compare one object."""
    entry: Any = registry.lookup("exporter", "textured-mesh")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        exporter = entry.cls(entry.config_cls(check=False, **({"formats": ["glb"]} | options)))
        result = exporter.export(known, Path(folder), "object")
        seconds = time.perf_counter() - start
        file = Textured.load(result.paths[0])
    azimuth = torch.arange(views) * (360.0 / views) + 25.0
    elevation = torch.tensor([35.0, -20.0])[torch.arange(views) % 2]
    cameras = orbit(azimuth, elevation, torch.full((views,), 3.2), torch.full((views,), 40.0), size, size)
    figures = [psnr(own_view(known, cameras[index]), file.view(cameras[index])) for index in range(views)]
    return Result(min(figures), sum(figures) / views, chamfer(known, file), result.report.mesh.faces, seconds)


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("options", nargs="*", help="exporter.<key>=<number>")
    arguments = parser.parse_args(argv)
    pairs = (option.removeprefix("exporter.").split("=") for option in arguments.options)
    options = {key: float(value) if "." in value else int(value) for key, value in pairs}
    results = {
        name: measure(known, options, views=arguments.views, size=arguments.size) for name, known in OBJECTS.items()
    }
    print("| object | faces | PSNR worst (dB) | PSNR mean (dB) | Chamfer | export (s) |\n|---|---|---|---|---|---|")
    for name, row in results.items():
        figures = f"{row.worst:.1f} | {row.mean:.1f} | {row.chamfer:.5f} | {row.seconds:.1f}"
        print(f"| {name} | {row.faces} | {figures} |")
    return int(any(row.worst < LEAST_PSNR for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
