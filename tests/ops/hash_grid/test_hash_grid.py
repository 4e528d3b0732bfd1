"""Hash grid: layout, an independent loop as oracle, gradients to second order, and every backend against torch."""

import itertools
import math
import sys
import types

import pytest
import torch

from scoredist3d.ops import backends, native
from scoredist3d.ops.hash_grid import native_backend as hash_grid_native
from scoredist3d.ops.hash_grid import torch_backend as hash_grid_torch
from scoredist3d.ops.hash_grid.encoding import _encode_tinycudann, hash_grid_encode
from scoredist3d.ops.hash_grid.spec import HashGridSpec

SPEC = HashGridSpec(num_levels=4, features_per_level=2, log2_hashmap_size=8, base_resolution=4, per_level_scale=1.7)
needs_native = pytest.mark.skipif(not native.available(), reason=f"no C kernels: {native.unavailable_reason()}")


def random_inputs(spec: HashGridSpec, count: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=generator, dtype=dtype)
    table = torch.randn(spec.num_entries, spec.features_per_level, generator=generator, dtype=dtype)
    return points, table, generator


def test_spec_matches_the_published_layout():
    # instant-ngp's usual grid: 16 levels from 16 to 2048 with 2^19 entries; resolution ceil(scale) + 1 per level.
    spec = HashGridSpec(16, 2, 19, 16, math.exp((math.log(2048) - math.log(16)) / 15))
    assert spec.resolutions[0] == 16 and spec.resolutions[-1] in (2048, 2049)
    assert spec.sizes[0] == 16**3 and spec.sizes[-1] == 2**19
    assert spec.hashed == tuple(r**3 > 2**19 for r in spec.resolutions)
    assert spec.num_entries == sum(spec.sizes) == spec.offsets[-1] and spec.output_dim == 32
    assert all(size % 8 == 0 for size in spec.sizes)


@pytest.mark.parametrize(
    "change",
    [{"num_levels": 0}, {"features_per_level": 3}, {"log2_hashmap_size": 40}, {"base_resolution": 1},
     {"per_level_scale": 0.5}, {"per_level_scale": float("nan")}, {"num_levels": 32, "per_level_scale": 2.0}],
)  # fmt: skip
def test_spec_rejects(change):
    with pytest.raises(ValueError, match="hash grid"):
        HashGridSpec(**change)


def slow_encode(point: list[float], table: torch.Tensor, spec: HashGridSpec) -> list[float]:
    """Features of one point, computed from the definition with Python integers."""
    out = []
    for level in range(spec.num_levels):
        position = [x * spec.scales[level] + 0.5 for x in point]
        low = [math.floor(p) for p in position]
        features = [0.0] * spec.features_per_level
        for corner in itertools.product((0, 1), repeat=3):
            x, y, z = (a + b for a, b in zip(low, corner, strict=True))
            weight = math.prod((p - a) if b else 1 - (p - a) for p, a, b in zip(position, low, corner, strict=True))
            if spec.resolutions[level] ** 3 > spec.sizes[level]:
                index = (x ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)) % spec.sizes[level]
            else:
                index = (x + y * spec.resolutions[level] + z * spec.resolutions[level] ** 2) % spec.sizes[level]
            entry = table[spec.offsets[level] + index]
            features = [f + weight * float(v) for f, v in zip(features, entry, strict=True)]
        out += features
    return out


def test_torch_equals_the_definition():
    points, table, _ = random_inputs(SPEC, 20, torch.float64)
    points[0], points[1] = 0.0, 1.0  # the faces of the cube
    expected = torch.tensor([slow_encode(p.tolist(), table, SPEC) for p in points], dtype=torch.float64)
    torch.testing.assert_close(hash_grid_encode(points, table, SPEC), expected, rtol=1e-12, atol=1e-12)


def test_gradients_to_second_order():
    spec = HashGridSpec(num_levels=2, features_per_level=2, log2_hashmap_size=5, base_resolution=3, per_level_scale=1.6)
    assert spec.hashed == (False, True)
    points, table, generator = random_inputs(spec, 5, torch.float64)
    inputs = (points.requires_grad_(), table.requires_grad_())

    def encode(points: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return hash_grid_encode(points, table, spec, backend="torch")

    assert torch.autograd.gradcheck(encode, inputs)
    upstream = torch.randn(5, spec.output_dim, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(encode, inputs, upstream)


def test_finite_differences_of_the_table():
    # The encoding is linear in the table, so a unit step of one entry changes the sum by exactly its gradient.
    points, table, _ = random_inputs(SPEC, 50, torch.float64)
    table.requires_grad_()
    (gradient,) = torch.autograd.grad(hash_grid_encode(points, table, SPEC).sum(), table)
    for entry in (0, 63, SPEC.offsets[2] + 5):
        moved = table.detach().clone()
        moved[entry, 1] += 1
        difference = hash_grid_encode(points, moved, SPEC).sum() - hash_grid_encode(points, table, SPEC).sum()
        torch.testing.assert_close(difference.detach(), gradient[entry, 1], rtol=0, atol=1e-10)


@needs_native
@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("directed", [False, True])
def test_native_kernels_equal_torch(features, directed):
    spec = HashGridSpec(6, features, 10, 4, 1.8)
    points, table, generator = random_inputs(spec, 1000 + 37)
    points = points * 1.2 - 0.1  # some outside the cube
    grad = torch.randn(len(points), spec.output_dim, generator=generator)
    direction = torch.randn(len(points), 3, generator=generator) if directed else None
    for name, inputs in (
        ("encode", (points, table)),
        ("table_gradient", (points, grad)),
        ("point_gradient", (points, table, grad)),
    ):
        for levels in (6, 2, 0):
            expected = getattr(hash_grid_torch, name)(*inputs, spec, levels, direction)
            found = getattr(hash_grid_native, name)(*inputs, spec, levels, direction)
            scale = float(expected.abs().max()) or 1.0
            assert float((found - expected).abs().max()) <= 1e-6 * scale, (name, levels)


@needs_native
def test_native_autograd_equals_torch_to_second_order():
    points, table, generator = random_inputs(SPEC, 300)
    direction = torch.randn(300, 8, generator=generator)

    def normals_loss(backend: str) -> tuple[torch.Tensor, ...]:
        p, t = points.clone().requires_grad_(), table.clone().requires_grad_()
        value = (hash_grid_encode(p, t, SPEC, backend=backend) * direction).square().sum()
        (normal,) = torch.autograd.grad(value, p, create_graph=True)
        return torch.autograd.grad(normal.square().sum(), (p, t))

    for found, expected in zip(normals_loss("native"), normals_loss("torch"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@needs_native
def test_native_is_bit_identical_for_any_number_of_threads():
    points, table, generator = random_inputs(SPEC, 5000)
    grad = torch.randn(5000, SPEC.output_dim, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2 * SPEC.num_levels + 1):
            torch.set_num_threads(threads)
            results.append(
                (
                    hash_grid_native.encode(points, table, SPEC, 4),
                    hash_grid_native.table_gradient(points, grad, SPEC, 4),
                    hash_grid_native.point_gradient(points, table, grad, SPEC, 4),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_inactive_levels_are_zero_and_get_no_gradient(backend):
    points, table, _ = random_inputs(SPEC, 40)
    table.requires_grad_()
    out = hash_grid_encode(points, table, SPEC, backend=backend, num_active_levels=2)
    full = hash_grid_encode(points, table, SPEC, backend=backend)
    torch.testing.assert_close(out[:, :4], full[:, :4], rtol=1e-6, atol=1e-6)
    assert not out[:, 4:].any()
    (gradient,) = torch.autograd.grad(out.sum(), table)
    assert gradient[: SPEC.offsets[2]].any() and not gradient[SPEC.offsets[2] :].any()


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_outside_points_are_clamped_and_nan_stays(backend):
    points, table, _ = random_inputs(SPEC, 3)
    points[0] = torch.tensor([1.5, 0.3, -0.5])
    points[1, 1] = float("nan")
    points.requires_grad_()
    out = hash_grid_encode(points, table, SPEC, backend=backend)
    clamped = hash_grid_encode(points.detach()[:1].clamp(0, 1), table, SPEC, backend=backend)
    torch.testing.assert_close(out[:1], clamped, rtol=1e-6, atol=1e-6)
    assert out[1].isnan().all() and out[2].isfinite().all()
    (gradient,) = torch.autograd.grad(out[0].sum(), points)
    assert gradient[0, 0] == 0 and gradient[0, 2] == 0 and gradient[0, 1] != 0


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_no_points(backend):
    _, table, _ = random_inputs(SPEC, 1)
    table.requires_grad_()
    out = hash_grid_encode(torch.empty(0, 3), table, SPEC, backend=backend)
    assert out.shape == (0, 8)
    assert not torch.autograd.grad(out.sum(), table)[0].any()


def test_errors_name_the_problem():
    points, table, _ = random_inputs(SPEC, 3)
    for bad, message in (
        ((points[:, :2], table), r"points must be \(N, 3\)"),
        ((points, table[:-1]), "the table must be"),
        ((points.double(), table), "must have the same dtype and device"),
    ):
        with pytest.raises(ValueError, match=message):
            hash_grid_encode(*bad, SPEC)
    with pytest.raises(ValueError, match="num_active_levels must be from 0 to 4, got 5"):
        hash_grid_encode(points, table, SPEC, num_active_levels=5)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto, torch"):
        hash_grid_encode(points, table, SPEC, backend="cuda")
    with pytest.raises(ValueError, match="'tinycudann' cannot be used: it needs CUDA tensors"):
        hash_grid_encode(points, table, SPEC, backend="tinycudann")


def test_missing_package_comes_with_its_install_line(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends.missing.cache_clear()
    try:
        assert backends.missing("tinycudann") == "the package tinycudann is not installed; see requirements-cuda.txt"
        assert "pip install nerfacc" in (backends.missing("nerfacc") or "")
    finally:
        backends.missing.cache_clear()


def test_tinycudann_adapter_trains_our_table(monkeypatch):
    """With a stand-in for the package: the table replaces the parameters of the module and receives gradients."""

    class Encoding(torch.nn.Module):
        def __init__(self, num_inputs: int, config: dict, dtype: torch.dtype):
            super().__init__()
            assert (num_inputs, config["n_levels"], config["otype"]) == (3, 4, "HashGrid")
            self.params = torch.nn.Parameter(torch.zeros(SPEC.num_entries * 2, dtype=dtype))

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            return hash_grid_encode(points, self.params.view(-1, 2), SPEC, backend="torch")

    monkeypatch.setitem(sys.modules, "tinycudann", types.SimpleNamespace(Encoding=Encoding))
    points, table, _ = random_inputs(SPEC, 30)
    table.requires_grad_()
    out = _encode_tinycudann(points, table, SPEC, 3)
    expected = hash_grid_encode(points, table, SPEC, backend="torch", num_active_levels=3)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    gradients = (torch.autograd.grad(o.square().sum(), table)[0] for o in (out, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "tinycudann"])
def test_cuda_backends_equal_torch(backend):
    pytest.importorskip(backend)
    spec = HashGridSpec(8, 2, 14, 8, 1.5)
    points, table, generator = random_inputs(spec, 20000)
    grad = torch.randn(20000, spec.output_dim, generator=generator).cuda()
    results = []
    for name in (backend, "torch"):
        p, t = points.cuda().requires_grad_(), table.cuda().requires_grad_()
        out = hash_grid_encode(p, t, spec, backend=name)
        results.append((out, *torch.autograd.grad((out * grad).sum(), (p, t))))
    # tiny-cuda-nn finds the position in the cell with a fused multiply-add: one ulp of it, times the resolution.
    tolerance = 1e-6 if backend == "triton" else 1e-4
    for found, expected, factor in zip(*results, (1, 10, 10), strict=True):
        error = float((found - expected).detach().abs().max() / expected.detach().abs().max())
        assert error <= tolerance * factor
