"""Runs the Triton kernels in Triton's interpreter on CPU tensors and compares them with torch.

A script and not a test: the interpreter must be chosen before Triton is imported. test_triton.py runs it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from scoredist3d.ops.hash_grid.encoding import hash_grid_encode
from scoredist3d.ops.hash_grid.spec import HashGridSpec
from scoredist3d.ops.volume_rendering.compositing import accumulate, render_weights
from scoredist3d.ops.volume_rendering.ray_marching import march_rays


def compare(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    error = float((found - expected).detach().abs().max() / expected.detach().abs().max())
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"
    print(f"{name}: {error:.1e}")


def hash_grid(features: int, levels: int) -> None:
    spec = HashGridSpec(3, features, 8, 4, 2.2)
    generator = torch.Generator().manual_seed(features)
    points = torch.rand(300, 3, generator=generator) * 1.2 - 0.1
    table = torch.randn(spec.num_entries, features, generator=generator)
    upstream = torch.randn(300, spec.output_dim, generator=generator)
    results = []
    for backend in ("triton", "torch"):
        p, t = points.clone().requires_grad_(), table.clone().requires_grad_()
        out = hash_grid_encode(p, t, spec, backend=backend, num_active_levels=levels)
        by_points, by_table = torch.autograd.grad((out * upstream).square().sum(), (p, t), create_graph=True)
        second = torch.autograd.grad(by_points.square().sum(), (p, t))
        results.append((out, by_points, by_table, *second))
    names = ("features", "point gradient", "table gradient", "second order, points", "second order, table")
    for name, found, expected in zip(names, *results, strict=True):
        compare(f"hash grid F={features} {name}", found, expected, 1e-6 if name == "features" else 1e-5)


def rays(resolution: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 37
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    origins = -3 * directions + 0.4 * torch.randn(count, 3, generator=generator)
    occupancy = None if resolution is None else torch.rand((resolution,) * 3, generator=generator) < 0.4
    jitter = torch.rand(count, generator=generator)
    settings = {"radius": 1.0, "step_size": 0.043, "occupancy": occupancy, "jitter": jitter}
    samples = march_rays(origins, directions, **settings, backend="torch")
    found = march_rays(origins, directions, **settings, backend="triton")
    for field in ("ray_indices", "t_starts", "t_ends", "offsets"):
        assert torch.equal(getattr(found, field), getattr(samples, field)), (resolution, field)
    if len(samples) == 0:
        return
    densities = torch.rand(len(samples), generator=generator) ** 4 * 60
    values = torch.randn(len(samples), 3, generator=generator)
    results = []
    for backend in ("triton", "torch"):
        d, v = densities.clone().requires_grad_(), values.clone().requires_grad_()
        weights = render_weights(d, samples, backend=backend)
        image, opacity = (accumulate(weights, x, samples, backend=backend) for x in (v, None))
        results.append((image, opacity, *torch.autograd.grad(image.square().sum() + opacity.sum(), (d, v))))
    for name, a, b in zip(("image", "opacity", "density gradient", "value gradient"), *results, strict=True):
        compare(f"rays {resolution} {name}", a, b, 5e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    hash_grid(1, 3)
    hash_grid(2, 2)
    hash_grid(4, 3)
    for resolution in (None, 1, 12):
        rays(resolution)
