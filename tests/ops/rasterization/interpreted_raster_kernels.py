"""Runs the Triton rasterizer in Triton's interpreter on CPU tensors and compares it with torch.

A script and not a test: the interpreter must be chosen before Triton is imported. test_rasterize_triton.py runs it.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import trimesh
from torch.utils._python_dispatch import TorchDispatchMode

from scoredist3d.cameras import orbit
from scoredist3d.ops.rasterization import antialias as antialias_module
from scoredist3d.ops.rasterization import kernels as raster_backends
from scoredist3d.ops.rasterization import rasterize as rasterize_module
from scoredist3d.ops.rasterization import torch_backend as rasterize_torch
from scoredist3d.ops.rasterization import triton_backend as rasterize_triton
from scoredist3d.ops.rasterization.fragments import Fragments, shade_hits
from scoredist3d.ops.rasterization.rasterize import antialias, interpolate, mesh_edges, rasterize, sample_texture

SIZE = (9, 13)


def scene(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a torus with holes from two sides, from outside or from inside."""
    mesh = trimesh.creation.torus(1.0, 0.4, major_sections=9, minor_sections=5)
    vertices = torch.nn.functional.pad(torch.tensor(mesh.vertices, dtype=torch.float32), (0, 1), value=1.0)
    two = torch.tensor([10.0, 200.0])
    camera = orbit(two, 0.2 * two, torch.full((2,), distance), torch.full((2,), 60.0), *SIZE)
    clip = vertices @ (camera.projection() @ camera.w2c).transpose(1, 2)
    return clip.contiguous(), torch.tensor(mesh.faces[:-12], dtype=torch.int32)


def compare(distance: float, each_alone: bool = False) -> None:
    clip, faces = scene(distance)
    triangles = [m.visible_triangles(clip, faces, *SIZE) for m in (rasterize_triton, rasterize_torch)]
    assert torch.equal(*triangles), "visible triangles"
    found = rasterize(clip, faces, *SIZE, backend="triton")
    arguments = (clip, faces, mesh_edges(faces).across, found.triangle, found.depth)
    codes = [m.silhouettes(*arguments) for m in (rasterize_triton, rasterize_torch)]
    assert torch.equal(*codes), "silhouettes"
    compare_shading(clip, faces, found.triangle)
    if each_alone:
        compare_interpolation(clip, faces, found)
    compare_antialiasing(clip, faces, found, each_alone)
    print(f"distance {distance}: {int(found.mask.sum())} pixels, {int((codes[0] > 0).sum())} crossings agree")


def agree(
    what: str, function: Callable[..., tuple[torch.Tensor, ...]], *leaves: torch.Tensor, each_alone: bool = True
) -> None:
    """Assert equal outputs and gradients of triton and torch, for each leaf alone and for all leaves."""
    alone = [[leaf is needed for leaf in leaves] for needed in leaves] if len(leaves) > 1 and each_alone else []
    for need in (*alone, [True] * len(leaves)):
        results = []
        for backend in ("triton", "torch"):
            inputs = [leaf.clone().requires_grad_(n) for leaf, n in zip(leaves, need, strict=True)]
            outputs = [out for out in function(backend, *inputs) if out.requires_grad]
            generator = torch.Generator().manual_seed(0)
            upstream = [torch.randn(out.shape, generator=generator) for out in outputs]
            wanted = [leaf for leaf in inputs if leaf.requires_grad]
            gradients = torch.autograd.grad(outputs, wanted, upstream)
            assert all(gradient.abs().max() > 0 for gradient in gradients), what
            results.append((*outputs, *gradients))
        for ours, reference in zip(*results, strict=True):
            scale = float(reference.detach().abs().max())
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * scale, msg=lambda m: f"{what}: {m}")


def compare_shading(clip: torch.Tensor, faces: torch.Tensor, triangle: torch.Tensor) -> None:
    def shade(backend: str, clip: torch.Tensor, which: slice) -> tuple[torch.Tensor, ...]:
        found = shade_hits(clip, faces, triangle, backend=backend)
        return (found.barycentric, found.depth)[which]

    for which in (slice(0, 2), slice(0, 1), slice(1, 2)):
        agree("barycentrics and depth", partial(shade, which=which), clip)


def compare_interpolation(clip: torch.Tensor, faces: torch.Tensor, found: Fragments) -> None:
    generator = torch.Generator().manual_seed(1)
    own_faces = torch.randint(0, 9, faces.shape, generator=generator)  # int64, where faces are int32

    def draw(backend: str, barycentric: torch.Tensor, shared: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor]:
        seen = Fragments(found.triangle, barycentric, found.depth)
        first = interpolate(shared, seen, faces, backend=backend)
        second = interpolate(own, seen, faces, attribute_faces=own_faces, backend=backend)
        return (torch.cat((first, second), dim=-1),)

    shared, own = torch.randn(clip.shape[1], 18, generator=generator), torch.randn(2, 9, 3, generator=generator)
    agree("interpolation", draw, found.barycentric, shared, own)


def compare_antialiasing(clip: torch.Tensor, faces: torch.Tensor, found: Fragments, each_alone: bool) -> None:
    image = torch.randn(*found.triangle.shape, 3, generator=torch.Generator().manual_seed(2))

    def smooth(backend: str, image: torch.Tensor, clip: torch.Tensor) -> tuple[torch.Tensor]:
        return (antialias(image, found, clip, faces, backend=backend),)

    agree("antialiasing", smooth, image, clip, each_alone=each_alone)


def compare_texture() -> None:
    generator = torch.Generator().manual_seed(3)
    uv = torch.rand(2, 80, 2, generator=generator) * 3 - 1
    for filter, wrap in product(("linear", "nearest"), ("repeat", "clamp")):

        def look_up(backend: str, texture: torch.Tensor, uv: torch.Tensor) -> tuple[torch.Tensor]:
            return (sample_texture(texture, uv, filter=filter, wrap=wrap, backend=backend),)  # noqa: B023

        texture = torch.randn(2, 5, 6, 3, generator=generator)
        if filter == "linear":
            agree(f"{filter} {wrap}", look_up, texture, uv)
        else:  # no gradient to uv
            agree(f"{filter} {wrap}", partial(look_up, uv=uv), texture)
        agree(f"{filter} {wrap} of one", partial(look_up, uv=uv), torch.randn(1, 7, 19, generator=generator))
    print("textures agree")


class Recorder(TorchDispatchMode):
    """Records the names of the torch operations that run, except those of the interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if sys._getframe(1).f_globals["__name__"] != "triton.runtime.interpreter":
            self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def host_never_waits(clip: torch.Tensor, faces: torch.Tensor) -> None:
    """No operation reads a value or has a result whose shape depends on values: on CUDA these synchronize."""
    colours = torch.rand(clip.shape[1], 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    clip = clip.clone().requires_grad_()
    checked = raster_backends.prepared_faces  # reads the indices on the CPU, and only there
    rasterize_module.prepared_faces = antialias_module.prepared_faces = lambda op, clip, faces: faces
    with Recorder() as recorder:
        topology = mesh_edges(faces)
        found = rasterize(clip, faces, *SIZE, backend="triton")
        image = interpolate(colours, found, faces, backend="triton")
        antialias(image, found, clip, faces, topology=topology, backend="triton").sum().backward()
    rasterize_module.prepared_faces = antialias_module.prepared_faces = checked
    assert clip.grad.abs().max() > 0 and colours.grad.abs().max() > 0
    waits = ("nonzero", "_local_scalar_dense", "repeat_interleave.Tensor", "masked_select", "unique", "equal")
    assert not [name for name in recorder.names if name.removeprefix("aten::").startswith(waits)], recorder.names
    assert "aten::cumsum" in recorder.names and "aten::index.Tensor" not in recorder.names
    print("no waiting")


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare(3.0, each_alone=True)
    compare(0.9)
    compare_texture()
    clip, faces = scene(2.0)
    host_never_waits(clip[:1], faces[:40])
    for height, width in ((1, 1), (1, 9), (7, 1)):
        seen = [rasterize(clip, faces, height, width, backend=name) for name in ("triton", "torch")]
        assert torch.equal(seen[0].triangle, seen[1].triangle)
        torch.testing.assert_close(seen[0].depth, seen[1].depth)
    nothing = rasterize(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]), 4, 4, backend="triton")
    assert not nothing.mask.any()
    clip, faces = torch.zeros(2, 0, 4), torch.empty(0, 3, dtype=torch.int64)
    nothing = rasterize(clip, faces, 4, 5, backend="triton")
    image = interpolate(torch.zeros(0, 3), nothing, faces, backend="triton")
    assert not nothing.mask.any() and torch.equal(image, torch.zeros(2, 4, 5, 3))
    assert torch.equal(antialias(image, nothing, clip, faces, backend="triton"), image)
