"""Ray marching and compositing: closed forms, gradients, and every backend against torch."""

import math

import pytest
import torch

from scoredist3d.ops import native
from scoredist3d.ops.volume_rendering.compositing import accumulate, render_weights, transmittance
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples, ball_intersection, march_rays

needs_native = pytest.mark.skipif(not native.available(), reason=f"no C kernels: {native.unavailable_reason()}")
CPU_BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


def pack(counts: list[int], length: float, dtype: torch.dtype = torch.float32) -> RaySamples:
    """Rays with the given numbers of intervals of equal length, starting at t = 1."""
    indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    starts = 1 + (torch.arange(len(indices)) - offsets[indices]).to(dtype) * length
    return RaySamples(indices, starts, starts + length, offsets, len(counts))


def random_rays(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    origins = -3 * directions + 0.4 * torch.randn(count, 3, generator=generator)
    return origins, directions, generator


def test_ball_intersection():
    origins = torch.tensor([[3.0, 0, 0], [3.0, 0.6, 0], [3.0, 2, 0], [0.5, 0, 0], [-3.0, 0, 0]], dtype=torch.float64)
    directions = torch.tensor([[-1.0, 0, 0]], dtype=torch.float64).expand(5, 3)
    near, far = ball_intersection(origins, directions, 1.0)
    # head on; 0.6 beside the centre (half chord 0.8); miss; from inside; behind the camera
    torch.testing.assert_close(near[[0, 1, 3]], torch.tensor([2.0, 2.2, 0.0], dtype=torch.float64))
    torch.testing.assert_close(far[[0, 1, 3]], torch.tensor([4.0, 3.8, 1.5], dtype=torch.float64))
    assert (near[[2, 4]] == far[[2, 4]]).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_march_by_hand(backend):
    origins = torch.tensor([[3.0, 0.1, 0.1], [3.0, 5.0, 0.0]])
    directions = torch.tensor([[-1.0, 0, 0], [-1.0, 0, 0]])
    occupancy = torch.zeros(4, 4, 4, dtype=torch.bool)
    occupancy[1, 2, 2] = True  # x in [-0.5, 0], y and z in [0, 0.5]: t from 3 to 3.5
    samples = march_rays(
        origins, directions, radius=1.0, step_size=0.125, occupancy=occupancy, jitter=torch.tensor([0.5, 0]),
        backend=backend,
    )  # fmt: skip
    near = 3 - math.sqrt(1 - 0.02)
    expected = [near + (k + 0.5) * 0.125 for k in range(20) if 3 < near + (k + 1) * 0.125 < 3.5]
    assert len(expected) == 4
    torch.testing.assert_close(samples.t_starts, torch.tensor(expected))
    torch.testing.assert_close(samples.lengths, torch.full((4,), 0.125))
    assert samples.offsets.tolist() == [0, 4, 4] and samples.num_rays == 2 and not samples.ray_indices.any()
    assert (samples.positions(origins, directions)[:, 0].abs() < 0.5).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_march_covers_the_chord(backend):
    origins, directions, _ = random_rays(200)
    near, far = ball_intersection(origins, directions, 1.0)
    samples = march_rays(origins, directions, radius=1.0, step_size=0.01, backend=backend)
    covered = accumulate(samples.lengths, None, samples, backend="torch")[:, 0]
    assert float((covered - (far - near)).abs().max()) <= 0.005 + 1e-5  # the rule of the midpoint
    assert (samples.positions(origins, directions).norm(dim=1) <= 1 + 1e-5).all()


@needs_native
@pytest.mark.parametrize("resolution", [None, 1, 17, 32])
@pytest.mark.parametrize("jittered", [False, True])
def test_native_march_keeps_exactly_the_same_intervals(resolution, jittered):
    origins, directions, generator = random_rays(777)
    occupancy = None if resolution is None else torch.rand((resolution,) * 3, generator=generator) < 0.3
    jitter = torch.rand(777, generator=generator) if jittered else None
    settings = {"radius": 0.9, "step_size": 0.0137, "occupancy": occupancy, "jitter": jitter}
    a, b = (march_rays(origins, directions, **settings, backend=name) for name in ("native", "torch"))
    for field in ("ray_indices", "t_starts", "t_ends", "offsets"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_to_march(backend):
    none = march_rays(torch.empty(0, 3), torch.empty(0, 3), radius=1.0, step_size=0.1, backend=backend)
    assert len(none) == 0 and none.offsets.tolist() == [0]
    origins, directions, _ = random_rays(5)
    empty = torch.zeros(8, 8, 8, dtype=torch.bool)
    samples = march_rays(origins, directions, radius=1.0, step_size=0.1, occupancy=empty, backend=backend)
    weights = render_weights(torch.empty(0), samples, backend=backend)
    assert len(samples) == 0 and samples.offsets.tolist() == [0] * 6
    assert torch.equal(accumulate(weights, torch.empty(0, 3), samples, backend=backend), torch.zeros(5, 3))


def test_select_keeps_all_rays():
    samples = pack([3, 0, 2], 0.1)
    kept = samples.select(torch.tensor([True, False, True, False, True]))
    assert kept.offsets.tolist() == [0, 2, 2, 3] and kept.ray_indices.tolist() == [0, 0, 2] and kept.num_rays == 3


def test_march_errors():
    origins, directions, _ = random_rays(4)
    with pytest.raises(ValueError, match=r"must both be \(R, 3\)"):
        march_rays(origins, directions[:2], radius=1.0, step_size=0.1)
    with pytest.raises(ValueError, match="must be positive"):
        march_rays(origins, directions, radius=1.0, step_size=0.0)
    with pytest.raises(ValueError, match="more than 2\\^20 intervals"):
        march_rays(origins, directions, radius=1.0, step_size=1e-7)
    with pytest.raises(ValueError, match="occupancy must be a bool tensor"):
        march_rays(origins, directions, radius=1.0, step_size=0.1, occupancy=torch.ones(4, 4, 4))
    with pytest.raises(ValueError, match=r"jitter must be \(4,\)"):
        march_rays(origins, directions, radius=1.0, step_size=0.1, jitter=torch.zeros(3))
    with pytest.raises(ValueError, match="'nerfacc' cannot be used: it needs CUDA tensors"):
        march_rays(origins, directions, radius=1.0, step_size=0.1, backend="nerfacc")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("sigma", [0.0, 1e-4, 0.7, 30.0, 1e8])
def test_slab_of_constant_density(backend, sigma):
    samples = pack([50, 0, 7], 0.02)
    weights = render_weights(torch.full((57,), sigma), samples, backend=backend)
    opacity = accumulate(weights, None, samples, backend=backend)[:, 0]
    expected = [-math.expm1(-sigma * length) for length in (1.0, 0.0, 0.14)]
    torch.testing.assert_close(opacity, torch.tensor(expected), rtol=3e-6, atol=0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_exponential_depth(backend):
    # In a slab from 0 to L the depth is exponential: E[t; hit] = 1/s - exp(-s L) (L + 1/s). Midpoints err by O(dt^2).
    sigma, length, steps = 3.0, 2.0, 400
    samples = pack([steps], length / steps)
    weights = render_weights(torch.full((steps,), sigma), samples, backend=backend)
    depth = accumulate(weights, (samples.midpoints - 1)[:, None], samples, backend=backend)
    expected = 1 / sigma - math.exp(-sigma * length) * (length + 1 / sigma)
    assert float(depth) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_two_slabs_occlude(backend):
    samples = pack([20, 20], 0.1)
    densities = torch.zeros(40)
    densities[2:5], densities[10:20] = 2.0, 5.0  # front and back of ray 0; ray 1 is empty
    colors = torch.zeros(40, 2)
    colors[2:5, 0], colors[10:20, 1] = 1.0, 1.0
    image = accumulate(render_weights(densities, samples, backend=backend), colors, samples, backend=backend)
    front, back = 1 - math.exp(-0.6), 1 - math.exp(-5.0)
    expected = torch.tensor([[front, (1 - front) * back], [0.0, 0.0]])
    torch.testing.assert_close(image, expected, rtol=2e-6, atol=0)
    assert transmittance(densities, samples)[19].item() == pytest.approx(math.exp(-0.6 - 4.5), rel=1e-5)


def test_gradcheck():
    samples = pack([4, 0, 1, 6], 0.3, torch.float64)
    generator = torch.Generator().manual_seed(0)
    densities = torch.rand(11, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.randn(11, 2, generator=generator, dtype=torch.float64).requires_grad_()

    def image(densities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = render_weights(densities, samples)
        return torch.cat((accumulate(weights, values, samples), accumulate(weights, None, samples)), dim=1)

    assert torch.autograd.gradcheck(image, (densities, values))
    upstream = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(image, (densities, values), upstream)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_long_concatenations_lose_nothing(backend):
    # Ray after ray of optical depth 50: 1e6 in all, of which a float32 running sum keeps a digit after the point.
    samples = pack([100] * 20000, 0.01)
    densities = torch.full((100,), 50.0).repeat(20000)
    densities[-100:] = 0.01
    weights = render_weights(densities, samples, backend=backend)
    last = accumulate(weights, None, samples, backend=backend)[-1, 0]
    assert float(last) == pytest.approx(-math.expm1(-0.01), rel=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_infinite_density_is_a_wall(backend):
    samples = pack([3, 2], 0.1)
    densities = torch.tensor([0.0, float("inf"), 1.0, 1.0, 0.0], requires_grad=True)
    weights = render_weights(densities, samples, backend=backend)
    torch.testing.assert_close(weights.detach(), torch.tensor([0, 1, 0, -math.expm1(-0.1), 0]), atol=1e-7, rtol=1e-6)
    assert torch.autograd.grad(weights.sum(), densities)[0].isfinite().all()


def render(densities: torch.Tensor, values: torch.Tensor, samples: RaySamples, backend: str) -> list[torch.Tensor]:
    """Image, opacity, and gradients of a fixed nonlinear loss."""
    d, v = densities.clone().requires_grad_(), values.clone().requires_grad_()
    weights = render_weights(d, samples, backend=backend)
    image = accumulate(weights, v, samples, backend=backend)
    opacity = accumulate(weights, None, samples, backend=backend)
    ramp = torch.linspace(-1, 2, samples.num_rays, device=d.device)[:, None]
    loss = (image * ramp).sum() + (opacity * ramp).square().sum() + (weights**2).sum()
    return [image.detach(), opacity.detach(), *torch.autograd.grad(loss, (d, v))]


@needs_native
def test_native_compositing_equals_torch():
    origins, directions, generator = random_rays(500)
    occupancy = torch.rand(16, 16, 16, generator=generator) < 0.4
    samples = march_rays(origins, directions, radius=1.0, step_size=0.02, occupancy=occupancy)
    densities = torch.rand(len(samples), generator=generator) ** 4 * 60
    values = torch.randn(len(samples), 3, generator=generator)
    for found, expected in zip(*(render(densities, values, samples, b) for b in ("native", "torch")), strict=True):
        assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_compositing_errors():
    samples = pack([2], 0.1)
    with pytest.raises(ValueError, match=r"densities must be \(2,\)"):
        render_weights(torch.zeros(3), samples)
    with pytest.raises(ValueError, match=r"values must be \(2, C\)"):
        accumulate(torch.zeros(2), torch.zeros(3, 1), samples)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton", "nerfacc"])
def test_cuda_backends_equal_the_cpu(backend):
    pytest.importorskip(backend)
    origins, directions, generator = random_rays(500)
    occupancy = torch.rand(16, 16, 16, generator=generator) < 0.4
    settings = {"radius": 1.0, "step_size": 0.02, "backend": backend}
    found = march_rays(origins.cuda(), directions.cuda(), occupancy=occupancy.cuda(), **settings)
    samples = march_rays(origins, directions, radius=1.0, step_size=0.02, occupancy=occupancy)
    # Rounding may move a midpoint across a cell border: at most a few intervals differ.
    assert abs(len(found) - len(samples)) <= 0.002 * len(samples)
    moved = RaySamples(*(getattr(samples, f).cuda() for f in ("ray_indices", "t_starts", "t_ends", "offsets")), 500)
    densities = torch.rand(len(samples), generator=generator) ** 4 * 60
    values = torch.randn(len(samples), 3, generator=generator)
    expected = render(densities, values, samples, "torch")
    for a, b in zip(render(densities.cuda(), values.cuda(), moved, backend), expected, strict=True):
        assert float((a.cpu() - b).abs().max()) <= 1e-5 * float(b.abs().max())
