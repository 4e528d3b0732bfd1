"""Rows of ``ops.py`` for meshes: rasterization, iso-surfaces, distance."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from ops_common import Row, cameras_around, differentiate, sphere, usable
from torch import Tensor

from scoredist3d.ops.isosurface import flexicubes as cubes
from scoredist3d.ops.isosurface import marching_tetrahedra as isosurface
from scoredist3d.ops.isosurface import tetrahedra
from scoredist3d.ops.mesh import distance as mesh_distance
from scoredist3d.ops.rasterization import kernels as raster_backends
from scoredist3d.ops.rasterization import rasterize

# (vertices, view projection, height or width) to an image.
Pipeline = Callable[[Tensor, Tensor, int], Tensor]


def rasterize_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Rasterise, interpolate 4 channels and antialias, ours with every backend and nvdiffrast's own three steps."""
    vertices, faces = sphere(arguments.subdivisions, device)
    names = usable((*raster_backends.BACKENDS, "nvdiffrast"), device)
    topology = rasterize.mesh_edges(faces)
    pipelines: list[tuple[str, Pipeline]] = [(name, partial(ours, faces, topology, name)) for name in names]
    if "nvdiffrast" in names:
        pipelines.append(("nvdiffrast, all three steps", nvdiffrast_pipeline(faces, device)))
    moving = vertices.clone().requires_grad_()
    for size in arguments.image_sizes:
        cameras = cameras_around(arguments.views, size, device)
        projection = cameras.projection() @ cameras.w2c
        label = f"{len(faces)} triangles, {arguments.views} x {size}^2"
        clip = to_clip(vertices, projection)
        for name in names:
            visible = partial(rasterize.rasterize, clip, faces, size, size, backend=name)
            yield f"rasterize {label}: forward", name, visible
        for name, pipeline in pipelines:
            operator = f"rasterize, interpolate, antialias {label}"
            yield f"{operator}: forward", name, partial(pipeline, vertices, projection, size)
            learn = partial(draw_and_differentiate, pipeline, moving, projection, size)
            yield f"{operator}: + vertex gradient", name, learn


def to_clip(vertices: Tensor, projection: Tensor) -> Tensor:
    """(B, V, 4); contiguous, which nvdiffrast insists on."""
    return (homogeneous(vertices) @ projection.transpose(1, 2)).contiguous()


def homogeneous(vertices: Tensor) -> Tensor:
    """(V, 4): also the four channels that are drawn, so that the gradient reaches the vertices by every way."""
    return torch.nn.functional.pad(vertices, (0, 1), value=1.0)


def ours(
    faces: Tensor, topology: rasterize.EdgeTopology, backend: str, vertices: Tensor, projection: Tensor, size: int
) -> Tensor:
    """Each step by the backend if it has that step, else by what ``auto`` takes."""
    clip = to_clip(vertices, projection)
    found = rasterize.rasterize(clip, faces, size, size, backend=backend)
    blending = backend if backend in ("torch", "native") else "auto"
    image = rasterize.interpolate(homogeneous(vertices), found, faces, backend=blending)
    smoothing = backend if backend in raster_backends.BACKENDS else "auto"
    return rasterize.antialias(image, found, clip, faces, topology=topology, backend=smoothing)


def nvdiffrast_pipeline(faces: Tensor, device: torch.device) -> Pipeline:
    """The same image by nvdiffrast alone, in its own row order and, as ours, with the mesh's edges found beforehand."""

    @cache
    def prepared() -> tuple[Any, Any, Any]:
        import nvdiffrast.torch as nvdiffrast

        context = nvdiffrast.RasterizeCudaContext(device=device)
        return nvdiffrast, context, nvdiffrast.antialias_construct_topology_hash(faces)

    def draw(vertices: Tensor, projection: Tensor, size: int) -> Tensor:
        nvdiffrast, context, edges = prepared()
        clip = to_clip(vertices, projection)
        found, _ = nvdiffrast.rasterize(context, clip, faces, (size, size), grad_db=False)
        image, _ = nvdiffrast.interpolate(homogeneous(vertices)[None], found, faces)
        return nvdiffrast.antialias(image, found, clip, faces, topology_hash=edges)

    return draw


def draw_and_differentiate(pipeline: Pipeline, vertices: Tensor, projection: Tensor, size: int) -> None:
    differentiate([pipeline(vertices, projection, size)], [vertices])


def tetrahedra_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    for resolution in arguments.tetrahedra:
        grid = tetrahedra.tetrahedral_grid(resolution).to(device)
        vertices, sdf = grid.vertices, ball_field(grid.vertices)
        moving = [tensor.clone().requires_grad_() for tensor in (vertices, sdf)]

        def extract(
            vertices: Tensor, sdf: Tensor, grid: tetrahedra.TetrahedralGrid = grid
        ) -> tuple[list[Tensor], Tensor]:
            found, faces = isosurface.marching_tetrahedra(vertices, sdf, grid)
            return [found], faces

        size = f"marching tetrahedra {resolution}, {len(grid.tets)} tetrahedra"
        yield from surface_rows(size, extract, [vertices, sdf], moving)


def flexicubes_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """As in training: with weights, quads cut in four, and the deviation that a regularizer takes."""
    for resolution in arguments.flexicubes:
        grid = cubes.voxel_grid(resolution).to(device)
        weights = 0.1 * torch.randn(grid.num_cubes, 21, generator=torch.Generator().manual_seed(0))
        fixed = [grid.vertices, ball_field(grid.vertices), weights.to(device)]
        moving = [tensor.clone().requires_grad_() for tensor in fixed]

        def extract(
            vertices: Tensor, sdf: Tensor, weights: Tensor, grid: cubes.VoxelGrid = grid
        ) -> tuple[list[Tensor], Tensor]:
            mesh = cubes.flexicubes(vertices, sdf, grid, weights, subdivide=True)
            return [mesh.vertices, mesh.deviation], mesh.faces

        yield from surface_rows(f"FlexiCubes {resolution}, {grid.num_cubes} cubes", extract, fixed, moving)


def ball_field(points: Tensor) -> Tensor:
    """(V,) signed distance of a ball off the lattice's symmetry."""
    return (points - points.new_tensor([0.03, 0.02, 0.01])).norm(dim=1) - 0.7


def surface_rows(
    size: str, extract: Callable[..., tuple[list[Tensor], Tensor]], fixed: list[Tensor], moving: list[Tensor]
) -> Iterator[Row]:
    size = f"{size}, {len(extract(*fixed)[1])} triangles"
    yield f"{size}: forward", "torch", partial(extract, *fixed)
    yield f"{size}: + gradients", "torch", lambda: differentiate(extract(*moving)[0], moving)


def distance_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """On a CPU the torch reference gets fewer points: it takes every point with every triangle, for an hour."""
    vertices, faces = sphere(arguments.subdivisions, device)
    points = 2 * torch.rand(arguments.distance_points, 3, generator=torch.Generator().manual_seed(0)) - 1
    points = points.to(device)
    for name in usable(mesh_distance.BACKENDS, device):
        share = points[: max(1, len(points) // 1000)] if (name, device.type) == ("torch", "cpu") else points
        find = partial(mesh_distance.signed_distance, share, vertices, faces, backend=name)
        yield f"signed distance {len(share)} points, {len(faces)} triangles", name, find
