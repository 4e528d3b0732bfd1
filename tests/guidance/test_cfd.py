"""Consistent flow distillation: the noise on surfaces, and the relations to SDS, FSD and ODE samplers."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from shared.method_cases import SIZE, CountingPrior, gradient, latents, method, prompted, views

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config import Schedule
from scoredist3d.config.validation import parse_component
from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.guidance.cfd import ConsistentFlowDistillation
from scoredist3d.guidance.core import surface_noise as surface_noise_module
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.noise_fields import PersistentNoise
from scoredist3d.guidance.core.surface_noise import (
    NoiseMaps,
    SurfaceNoise,
    covered_cells,
    surface_corners,
    surface_triangles,
)
from scoredist3d.seeding import Rng

MAPS = NoiseMaps(extent=1.0, resolution=256, layers=4)
COARSE = NoiseMaps(extent=1.0, resolution=64, layers=4)
GRID = 16
CHANNELS = 64


def falling(start: float, end: float, last: int) -> dict:
    schedule = {"from": start, "to": end, "end": last}
    return {"t_min": schedule, "t_max": schedule}


def around(azimuths, elevations, size: int = 4 * GRID, distance: float = 2.5) -> Cameras:
    count = len(azimuths)
    angles = (torch.tensor(a, dtype=torch.float64) for a in (azimuths, elevations))
    lengths = torch.full((count,), distance, dtype=torch.float64), torch.full((count,), 40.0, dtype=torch.float64)
    return orbit(*angles, *lengths, size, size)


def sphere(cameras: Cameras, radius: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth and opacity of a sphere around the origin."""
    rays = cameras.rays()
    middle = -(rays.origins * rays.directions).sum(-1)
    inside = middle.square() - rays.origins.square().sum(-1) + radius**2
    hit = (inside > 0).to(inside)
    return ((middle - inside.clamp(min=0).sqrt()) * hit)[..., None], hit[..., None]


def wall(cameras: Cameras, x: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth and opacity of the plane at ``x`` that faces +x and fills the image."""
    rays = cameras.rays()
    depth = (x - rays.origins[..., 0]) / rays.directions[..., 0]
    return depth[..., None], torch.ones_like(depth)[..., None]


def facing_wall(distance: float, y: float = 0.0, z: float = 0.0) -> Cameras:
    """A camera in front of the wall at x = 0.3 whose image is ``distance`` / 1.25 units wide."""
    camera = around([0.0], [0.0])
    camera.c2w[0, :3, 3] = torch.tensor([0.3 + distance, y, z], dtype=torch.float64)
    camera.fovy[:] = 2.0 * math.atan(0.4)
    return camera


def context(step: int = 0, batch: int = 1, particles=None, rng: Rng | None = None) -> StepContext:
    shown = tuple(particles or (0,) * batch)
    return StepContext(step, torch.zeros(batch), (0.0,) * batch, rng or Rng(), shown)


def surface_noise(rate: float = 0.0, maps: NoiseMaps = MAPS, cache_bytes: int = 2**28) -> SurfaceNoise:
    return SurfaceNoise(maps, PersistentNoise(Schedule.constant(rate)), cache_bytes=cache_bytes)


def seen_by(cameras: Cameras, render=sphere, *, maps: NoiseMaps = MAPS, channels: int = CHANNELS):
    """Noise (B, C, h, w) and mask (B, 1, h, w) of an analytic scene."""
    z = torch.zeros(len(cameras), channels, GRID, GRID, dtype=torch.float64)
    return surface_noise(maps=maps)(z, *render(cameras), cameras, context(batch=len(cameras)))


def cells_of(cameras: Cameras, render=sphere, maps: NoiseMaps = MAPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of a view, and the latents that have them."""
    corners, visible = surface_corners(*render(cameras), cameras, GRID, GRID)
    return covered_cells(*surface_triangles(corners, visible, torch.full_like(corners[..., 0], 9.0)), GRID * GRID, maps)


def test_is_registered_with_its_paper():
    entry = registry.lookup("guidance", "cfd")
    assert entry.cls is ConsistentFlowDistillation and entry.arxiv == "2501.05445"


def test_no_two_latents_of_a_view_share_a_cell():
    cells, latent = cells_of(around([30.0], [20.0]))
    assert len(cells.unique()) == len(cells) and (cells[1:] > cells[:-1]).all()
    assert latent.min() >= 0 and latent.max() < GRID**2 and cells.max() < 6 * MAPS.layers * (MAPS.tiles * 64) ** 2


def test_latents_are_independent_and_normal():
    n, seen = seen_by(around([30.0, -100.0], [20.0, 5.0]), maps=COARSE, channels=1000)
    assert 0.3 < seen.double().mean() < 0.4  # the disk of the sphere
    for item in range(2):
        x = n[item][:, seen[item, 0]].T  # (latents, samples)
        count = x.shape[1]
        covariance = x @ x.T / count
        assert (x.mean(1).abs() < 4.5 / count**0.5).all()
        assert (covariance.diagonal() - 1).abs().max() < 4.5 * (2 / count) ** 0.5
        others = covariance - covariance.diagonal().diag()
        assert others.abs().max() < 5.5 / count**0.5  # 4000 pairs: 5.5 standard errors
        assert abs(others.square().sum() / (others != 0).sum() * count - 1) < 0.1
        fourth = x.pow(4).mean()  # 3 for a normal distribution; the standard error is sqrt(96 / samples)
        assert abs(fourth - 3) < 4.5 * (96 / x.numel()) ** 0.5


def test_area_bounds_the_number_of_cells():
    """A wall that faces +x covers one cell per unit area; an oblique surface the sum over the axes of its normal."""
    cell = 2.0 * MAPS.extent / MAPS.resolution
    cameras = facing_wall(0.625)
    cells, latent = cells_of(cameras, wall)
    inner = torch.bincount(latent, minlength=GRID**2).reshape(GRID, GRID)[1:-1, 1:-1].double()
    assert abs(inner.mean() - (0.5 / GRID / cell) ** 2) < 0.05 * inner.mean()
    assert set((cells // (MAPS.tiles * 64) ** 2 // MAPS.layers).tolist()) == {0}, "only the map of +x"
    assert set((cells // (MAPS.tiles * 64) ** 2).tolist()) == {2}, "x = 0.3 is in the third of four layers of [-1, 1]"
    directions = cells_of(around([45.0], [30.0]))[0] // (MAPS.tiles * 64) ** 2 // MAPS.layers
    assert {0, 2, 4} <= set(directions.tolist()), "maps of +x, +y and +z"


def test_equal_footprints_have_equal_noise_in_two_views():
    pixel = 0.5 / GRID
    first, second = facing_wall(0.625), facing_wall(0.625, y=3 * pixel, z=-2 * pixel)
    (a, _), (b, _) = seen_by(first, wall), seen_by(second, wall)
    # The camera at +x has y to its right: it moved by 3 columns and 2 rows. The latents at the border of the image have
    # smaller footprints.
    inner_a, inner_b = a[0, :, 3:-1, 4:-1], b[0, :, 1:-3, 1:-4]
    agreement = (inner_a * inner_b).mean()
    assert agreement > 0.97, f"{agreement}"
    assert abs((a[0, :, 1:-1, 1:-1] * b[0, :, 1:-1, 1:-1]).mean()) < 0.05, (
        "latents of the image do not keep their noise"
    )


@pytest.mark.parametrize("zoom", [1, 2, 4])
def test_correlation_falls_with_the_difference_in_resolution(zoom):
    """A footprint that contains another one of 1 / zoom of its width correlates with it by 1 / zoom."""
    far, near = facing_wall(0.625), facing_wall(0.625 / zoom)
    (a, _), (b, _) = seen_by(far, wall, channels=400), seen_by(near, wall, channels=400)
    a = a[0].repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    middle = slice(a.shape[1] // 2 - GRID // 2 + 1, a.shape[1] // 2 + GRID // 2 - 1)
    measured = (a[:, middle, middle] * b[0, :, 1:-1, 1:-1]).mean()
    assert abs(measured - 1 / zoom) < 0.04, f"{measured}"


def test_noise_turns_with_the_surface_and_the_far_side_is_independent():
    views = around([0.0, 6.0, 180.0], [10.0, 10.0, -10.0])
    cells = [set(cells_of(views[item])[0].tolist()) for item in range(3)]
    shared = [len(cells[0] & other) / math.sqrt(len(cells[0]) * len(other)) for other in cells]
    assert shared[1] > 0.85 and shared[2] == 0.0


def test_the_sides_of_a_thin_plate_are_independent():
    front, back = around([0.0], [0.0]), around([180.0], [0.0])
    assert not set(cells_of(front, wall)[0].tolist()) & set(cells_of(back, wall)[0].tolist())


def test_the_outermost_of_two_surfaces_has_the_cell():
    points = torch.tensor([[0.1, -0.5, -0.5], [0.1, 0.5, -0.5], [0.1, 0.0, 0.5]], dtype=torch.float64)
    nearer = points + torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64)
    maps = NoiseMaps(extent=1.0, resolution=64, layers=1)
    for order in ((points, nearer), (nearer, points)):
        _, latent = covered_cells(torch.stack(order), torch.arange(2), 2, maps)
        assert set(latent.tolist()) == {0 if order[0] is nearer else 1}
        _, latent = covered_cells(torch.stack(order).flip(1), torch.arange(2), 2, maps)  # seen from -x
        assert set(latent.tolist()) == {0 if order[0] is points else 1}


def test_gaps_between_surfaces_and_points_outside_have_no_cells():
    cameras = around([0.0], [0.0])
    depth, opacity = wall(cameras)
    broken = depth.clone()
    broken[:, :, : 2 * GRID] -= 1.3  # the left half is nearer
    noise = surface_noise()
    z = torch.zeros(1, 4, GRID, GRID, dtype=torch.float64)
    _, seen = noise(z, broken, opacity, cameras, context())
    assert not seen[0, 0, :, GRID // 2 - 1 : GRID // 2 + 1].any(), "the two columns at the gap"
    assert seen[0, 0, :, : GRID // 2 - 1].all() and seen[0, 0, :, GRID // 2 + 1 :].all()
    n, seen = noise(z, depth, torch.zeros_like(opacity), cameras, context())
    assert not seen.any() and torch.equal(n, z)
    outside = surface_noise(maps=NoiseMaps(extent=0.1, resolution=64, layers=1))
    assert not outside(z, *wall(cameras, x=0.3), cameras, context())[1][..., 0, 0].any()


def test_candidates_in_chunks_give_the_same_cells(monkeypatch):
    camera = around([30.0], [20.0])
    whole = cells_of(camera)
    monkeypatch.setattr("scoredist3d.guidance.core.surface_noise.CHUNK", 1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, cells_of(camera), strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_noise_is_a_function_of_seed_particle_step_and_view(rate):
    cameras = around([30.0, 50.0], [20.0, 20.0])
    z, render = torch.zeros(2, 8, GRID, GRID, dtype=torch.float64), sphere(cameras)

    def noise(step: int, field: SurfaceNoise, item=slice(None), **where):
        picked = [tensor[item] for tensor in render]
        return field(z[item], *picked, cameras[item], context(step, batch=len(z[item]), **where))[0]

    field = surface_noise(rate, COARSE)
    for step in (0, 5):  # the second field has drawn nothing before, as after a resume, and keeps nothing
        assert torch.equal(noise(step, field), noise(step, surface_noise(rate, COARSE, cache_bytes=0)))
        assert torch.equal(noise(step, field, slice(1, 2)), noise(step, field)[1:])
    assert torch.equal(noise(5, field), noise(0, field)) == (rate == 0.0)
    assert torch.equal(noise(5, field, rng=Rng(0, rank=3)), noise(5, field))
    assert not torch.allclose(noise(5, field, rng=Rng(1)), noise(5, field))
    pair = noise(5, field, particles=[0, 7])
    assert torch.equal(pair[:1], noise(5, field)[:1]) and not torch.allclose(pair[1:], noise(5, field)[1:])


def test_the_cache_stays_within_its_memory():
    field = surface_noise(cache_bytes=3 * 64 * 64 * CHANNELS * 8)
    cameras = around([30.0], [20.0])
    field(torch.zeros(1, CHANNELS, GRID, GRID, dtype=torch.float64), *sphere(cameras), cameras, context())
    assert len(field._cache) == 3 and field._cached_bytes == sum(tile.nbytes for tile in field._cache.values())


def test_renewal_keeps_the_variance_and_moves_the_noise_by_its_rate():
    cameras = around([30.0], [20.0])
    z, render, field = (
        torch.zeros(1, CHANNELS, GRID, GRID, dtype=torch.float64),
        sphere(cameras),
        surface_noise(0.1, COARSE),
    )
    (first, seen), (later, _) = (field(z, *render, cameras, context(step)) for step in (3, 13))
    first, later = (n[:, :, seen[0, 0]] for n in (first, later))
    tolerance = 4.5 * (2 / first.numel()) ** 0.5
    assert abs(first.var() - 1) < tolerance and abs(later.var() - 1) < tolerance
    assert abs((first * later).mean() - 0.9**5) < tolerance


def surfaced(guidance, batch: int = 2, **extras):
    """Inputs of a step of a method that sees a sphere."""
    cameras = views(batch)
    depth, opacity = sphere(cameras, 0.7)
    return {"conditions": prompted(guidance, cameras=cameras), "depth": depth, "opacity": opacity, **extras}


def first_step(guidance, z, extras) -> StepContext:
    """Context of step 0, with a particle for each item as in ``gradient``."""
    return guidance.begin(z, 0, Rng(), particles=range(len(z)), depth=extras["depth"], opacity=extras["opacity"])


@pytest.mark.parametrize("weighting", ["lambda", "sds", "uniform"])
@pytest.mark.parametrize("options", [{"sde_rate": 1.0}, {"sqrt_beta": 0.0}])
def test_with_fresh_noise_it_is_sds_bit_for_bit(weighting, options):
    cfd = method("cfd", CountingPrior(), guidance_scale=7.5, weighting=weighting, **options)
    sds = method("sds", CountingPrior(), guidance_scale=7.5, weighting=weighting)
    for step in (0, 9):
        ours = gradient(cfd, latents(2), step, **surfaced(cfd))
        assert torch.equal(ours, gradient(sds, latents(2), step, **surfaced(sds)))


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-v_prediction", "rf-v_prediction"])
@pytest.mark.parametrize("weighting", ["lambda", "lambda-step"])
def test_free_images_follow_fsd_with_constant_noise(kind, weighting):
    options = {"weighting": weighting, **falling(0.9, 0.1, 10)}
    cfd = method("cfd", CountingPrior(kind), **options)
    fsd = method("fsd", CountingPrior(kind), noise_field="constant", **options)
    for step in (0, 4):
        assert torch.equal(gradient(cfd, latents(2), step), gradient(fsd, latents(2), step))


@pytest.mark.parametrize("kind", ["vp-epsilon", "rf-v_prediction"])
def test_for_a_fixed_view_it_is_fsd_with_the_noise_of_that_view(kind):
    """Each step equals the formula with the same noise n, whatever the step."""
    guidance = method("cfd", CountingPrior(kind), weighting="lambda", **falling(0.9, 0.1, 10))
    extras = surfaced(guidance)
    b, z = extras["conditions"], latents(2)
    start = first_step(guidance, z, extras)
    n = guidance.noise(z, b, start)
    for step in (0, 3, 9):
        t = torch.full((2,), guidance.sample_timesteps(1, step, Rng())[0], dtype=torch.float64)
        exact = z - guided_prediction(guidance.prior, guidance.schedule.add_noise(z, n, t), t, b, 7.5).x0
        torch.testing.assert_close(gradient(guidance, z, step, **extras), exact, rtol=0, atol=1e-10)


def test_gradient_descent_on_a_fixed_view_is_the_ode_of_its_noise():
    """A sphere seen from one camera: Euler steps on the rectified flow from n, which diffusers' sampler repeats."""
    timesteps = [0.99 - 0.09 * k for k in range(11)]
    guidance = method(
        "cfd", CountingPrior("rf-v_prediction"), weighting="lambda-step", **falling(timesteps[0], timesteps[-1], 10)
    )
    extras = surfaced(guidance)
    b, z = extras["conditions"], latents(2)
    n = guidance.noise(z, b, first_step(guidance, z, extras))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=timesteps)
    x = y = z = n  # (1 - t) z + t n = n
    for step in range(10):
        t = torch.full((2,), timesteps[step], dtype=torch.float64)
        y = scheduler.step(guided_prediction(guidance.prior, y, t, b, 7.5).v, scheduler.timesteps[step], y).prev_sample
        x = x + (timesteps[step + 1] - timesteps[step]) * guided_prediction(guidance.prior, x, t, b, 7.5).v
        z = z - gradient(guidance, z, step, **extras)
        here = (1 - timesteps[step + 1]) * z + timesteps[step + 1] * n
        torch.testing.assert_close(here, x, rtol=0, atol=1e-11)
        torch.testing.assert_close(here, y.double(), rtol=0, atol=2e-5)  # the scheduler computes in float32


def test_gradient_descent_on_a_fixed_view_is_ddim():
    guidance = method("cfd", CountingPrior(), weighting="lambda-step", **falling(0.999, 0.0, 20))
    extras = surfaced(guidance)
    b, z = extras["conditions"], torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64)
    n = guidance.noise(z, b, first_step(guidance, z, extras))
    t = torch.full((2,), 0.999, dtype=torch.float64)
    x = guidance.schedule.add_noise(z, n, t)
    for step in range(20):
        prediction = guided_prediction(guidance.prior, x, t, b, 7.5)
        following = torch.tensor(guidance.sample_timesteps(2, step + 1, Rng()), dtype=torch.float64)
        x = guidance.schedule.ddim_step(prediction.eps, prediction.x0, t, following)
        z, t = z - gradient(guidance, z, step, **extras), following
    torch.testing.assert_close(guidance.schedule.add_noise(z, n, t), x, rtol=0, atol=1e-9)


def test_background_is_fixed_or_fresh():
    z = latents(2)

    def noise(step: int, **options):
        guidance = method("cfd", CountingPrior(), **options)
        extras = surfaced(guidance)
        ctx = guidance.begin(z, step, Rng(), particles=(0, 0), depth=extras["depth"], opacity=extras["opacity"])
        return guidance.noise(z, extras["conditions"], ctx)

    fixed, fresh, later = noise(0), noise(0, background_noise="random"), noise(1, background_noise="random")
    assert torch.equal(fixed, noise(1)) and torch.equal(fixed[0, :, 0, 0], fixed[1, :, 0, 0])
    surface = (fresh == later).all(dim=1)
    assert torch.equal(fixed.movedim(1, -1)[surface], fresh.movedim(1, -1)[surface])
    assert 0.2 < surface.double().mean() < 0.8 and not torch.isclose(fresh, later).movedim(1, -1)[~surface].any()


def test_half_precision_latents_have_the_same_noise():
    guidance = method("cfd", CountingPrior())
    extras = surfaced(guidance)
    both = []
    for dtype in (torch.float32, torch.bfloat16):
        z = latents(2, dtype)
        ctx = first_step(guidance, z, extras)
        noise, seen = guidance._surface(SIZE)(z, ctx.depth, ctx.opacity, extras["conditions"].cameras, ctx)
        assert noise.dtype == dtype
        both.append(noise.double() * seen)
    torch.testing.assert_close(both[1], both[0], rtol=2**-8, atol=0)


def test_a_rate_of_one_must_be_constant():
    with pytest.raises(ValueError, match="sde_rate: a rate that changes must stay below 1"):
        parse_component("guidance", {"type": "cfd", "sde_rate": {"from": 0.1, "to": 1.0, "end": 10}})


def test_the_noise_of_a_view_does_not_depend_on_the_batch_and_the_tiles_at_once(monkeypatch):
    cameras = around([30.0, -100.0, 30.0], [20.0, 5.0, 20.0])
    z, render = torch.zeros(3, CHANNELS, GRID, GRID, dtype=torch.float64), sphere(cameras)
    together, seen = surface_noise()(z, *render, cameras, context(particles=(0, 0, 1)))
    assert seen.any() and not torch.equal(together[0], together[2]), "another particle has other noise"
    monkeypatch.setattr(surface_noise_module, "BYTES_AT_ONCE", 3 * 64**2 * CHANNELS * 8)
    in_parts, _ = surface_noise()(z, *render, cameras, context(particles=(0, 0, 1)))
    torch.testing.assert_close(in_parts, together)
    for item, particle in enumerate((0, 0, 1)):
        one, rendered = cameras[[item]], [values[[item]] for values in render]
        alone, _ = surface_noise()(z[[item]], *rendered, one, context(particles=(particle,)))
        torch.testing.assert_close(alone, together[[item]])
