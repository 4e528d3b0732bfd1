"""Runs the Triton rasteriser in Triton's interpreter on CPU tensors and compares it with torch.

A script and not a test: the interpreter must be chosen before Triton is imported. test_rasterize_triton.py runs it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import trimesh

from scoredist3d.cameras import orbit
from scoredist3d.ops import rasterize_torch, rasterize_triton
from scoredist3d.ops.rasterize import antialias, interpolate, mesh_edges, rasterize


def scene(distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A torn torus from two sides, from outside or from within."""
    mesh = trimesh.creation.torus(1.0, 0.4, major_sections=12, minor_sections=6)
    vertices = torch.nn.functional.pad(torch.tensor(mesh.vertices, dtype=torch.float32), (0, 1), value=1.0)
    two = torch.tensor([10.0, 200.0])
    camera = orbit(two, 0.2 * two, torch.full((2,), distance), torch.full((2,), 60.0), 11, 14)
    clip = vertices @ (camera.projection() @ camera.w2c).transpose(1, 2)
    return clip.contiguous(), torch.tensor(mesh.faces[:-16], dtype=torch.int32)


def compare(distance: float) -> None:
    clip, faces = scene(distance)
    triangles = [m.visible_triangles(clip, faces, 11, 14) for m in (rasterize_triton, rasterize_torch)]
    assert torch.equal(*triangles), "visible triangles"
    found = rasterize(clip, faces, 11, 14, backend="triton")
    arguments = (clip, faces, mesh_edges(faces).across, found.triangle, found.depth)
    codes = [m.silhouettes(*arguments) for m in (rasterize_triton, rasterize_torch)]
    assert torch.equal(*codes), "silhouettes"
    image = interpolate(clip[0, :, :3], found, faces)
    smooth = [antialias(image, found, clip, faces, backend=name) for name in ("triton", "torch")]
    assert torch.equal(*smooth), "antialiased image"
    print(f"distance {distance}: {int(found.mask.sum())} pixels, {int((codes[0] > 0).sum())} crossings agree")


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare(3.0)
    compare(0.9)
    nothing = rasterize(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]), 4, 4, backend="triton")
    assert not nothing.mask.any()
