"""Noise fields: the slowly renewed chain, windows and seams of the world map, and the mask of a render."""

import math
from itertools import pairwise

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.config import Schedule
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.noise_fields import PersistentNoise, covered, world_map_crop, world_map_shape
from scoredist3d.seeding import Rng

LIKE = torch.empty(1, 4, 40, 40, dtype=torch.float64)
COUNT = LIKE[0].numel()  # standard error of a correlation near 0: 1 / sqrt(6400) = 0.0125
TOLERANCE = 4.5 / COUNT**0.5


def at(step: int, particles=(0,), rng: Rng | None = None) -> StepContext:
    return StepContext(step, torch.zeros(len(particles)), (0.0,) * len(particles), rng or Rng(), tuple(particles))


def chain(noise: PersistentNoise, step: int, **keywords) -> torch.Tensor:
    return noise(at(step, **keywords), LIKE, "n")


def views(azimuths, elevations):
    count = len(azimuths)
    return orbit(
        torch.tensor(azimuths), torch.tensor(elevations), torch.full((count,), 3.0), torch.full((count,), 40.0), 8, 8
    )


@pytest.mark.parametrize(
    "rate", [Schedule.constant(1e-2), Schedule.ramp(1e-2, 1e-3, 20, 200), Schedule.ramp(0.0, 0.5, 100, 100, "step")]
)
def test_renewed_noise_is_the_recursions_chain(rate):
    noise = PersistentNoise(rate)
    steps = [0, 1, 2, 50, 99, 100, 101, 150, 400, 4095, 4096, 4097, 9000]
    x = torch.stack([chain(noise, step).flatten() for step in steps])
    assert (x.mean(1).abs() < TOLERANCE).all() and (x.var(1) - 1).abs().max() < 1.5 * TOLERANCE
    measured = x @ x.T / COUNT
    log_kept = [0.0]
    for step in range(steps[-1]):
        log_kept.append(log_kept[-1] + 0.5 * math.log1p(-rate(step)))
    expected = torch.tensor([[math.exp(-abs(log_kept[a] - log_kept[b])) for a in steps] for b in steps])
    # Variance of the estimate of a correlation rho from unit-variance pairs: (1 + rho^2) / n.
    assert (measured - expected).abs().max() < 4.5 * math.sqrt(2 / COUNT)
    # One step: sqrt(1 - g) of the past and g fresh variance, independent of all that came before (Markov).
    for k in (1, 50, 99, 100, 4095):
        fresh = chain(noise, k + 1) - math.sqrt(1 - rate(k)) * chain(noise, k)
        assert abs(fresh.var() - rate(k)) <= 1.5 * TOLERANCE * rate(k) + 1e-20
        past = torch.stack([chain(noise, k), chain(noise, k - 1)]).flatten(1)
        assert (past @ fresh.flatten() / COUNT).abs().max() <= TOLERANCE * math.sqrt(rate(k)) + 1e-12


def test_renewed_noise_is_a_function_of_seed_particle_and_step():
    noise = PersistentNoise(Schedule.constant(0.05))
    straight = [chain(noise, step) for step in range(6)]
    assert torch.equal(chain(PersistentNoise(Schedule.constant(0.05)), 5), straight[5])  # as after a resume
    assert torch.equal(chain(noise, 5, rng=Rng(0, rank=3)), straight[5])
    assert not torch.allclose(chain(noise, 5, rng=Rng(1)), straight[5])
    pair = noise(at(5, (7, 0)), LIKE.expand(2, -1, -1, -1), "n")
    assert torch.equal(pair[1:], straight[5]) and not torch.allclose(pair[:1], straight[5])
    constant = PersistentNoise(Schedule.constant(0.0))
    assert torch.equal(chain(constant, 5), chain(constant, 0)) and torch.equal(chain(constant, 0), straight[0])


@pytest.mark.parametrize(("angle", "shape"), [(180.0, (128, 128)), (360.0, (96, 64)), (90.0, (192, 256))])
def test_map_size(angle, shape):
    assert world_map_shape(64, 64, angle) == shape


def world(angle: float = 180.0, size: int = 16, batch: int = 1, seed: int = 0) -> torch.Tensor:
    shape = (4, *world_map_shape(size, size, angle))
    one = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return one.expand(batch, *shape)


@pytest.mark.parametrize("angle", [90.0, 180.0, 360.0])
def test_windows_are_distinct_cells_of_the_map(angle):
    azimuths = [0.0, 37.0, 90.0, 179.0, -120.0, -1.0]
    windows = world_map_crop(world(angle, 64, 6), views(azimuths, [0.0, 80.0, -80.0, 20.0, 89.0, -89.0]), 64, 64)
    count = 4 * 64 * 64  # standard errors: mean 0.0078, variance 0.011
    assert (windows.flatten(1).mean(1).abs() < 4.5 / count**0.5).all()
    assert ((windows.flatten(1).var(1) - 1).abs() < 4.5 * (2 / count) ** 0.5).all()
    for window in windows:
        assert len(window.unique()) == count  # no cell twice, so the values are independent
    assert torch.isin(windows, world(angle, 64)).all()  # and none is interpolated


def test_azimuth_is_periodic_across_the_seam():
    cameras = views([10.0, 10.0, -179.9, 180.0], [15.0] * 4)
    turned = cameras._map(lambda tensor: tensor.clone())
    turned.azimuth[1] += 2 * math.pi
    windows = world_map_crop(world(batch=4), turned, 16, 16)
    assert torch.equal(windows[0], windows[1]) and torch.equal(windows[2], windows[3])


def test_neighbouring_views_share_the_overlap_and_opposite_ones_nothing():
    size, angle = 64, 180.0
    step = angle / size  # degrees per column
    azimuths = [-170.0 + step * k for k in (0, 1, 5, 40)]
    windows = world_map_crop(world(angle, size, 4), views(azimuths, [0.0] * 4), size, size)
    for window, shift in zip(windows[1:], (1, 5, 40), strict=True):
        assert torch.equal(window[..., : size - shift], windows[0][..., shift:])
        rest, start = window[..., size - shift :].flatten(), windows[0][..., size - shift :].flatten()
        assert abs((rest * start).mean()) < 4.5 / len(rest) ** 0.5
    front, back = world_map_crop(world(angle, size, 2), views([20.0, -160.0], [0.0, 0.0]), size, size)
    assert not torch.isin(front, back).any()


def test_drift_per_degree_is_the_windows_width_over_its_angle():
    for angle in (90.0, 180.0, 360.0):
        first, second = world_map_crop(world(angle, 32, 2), views([0.0, 45.0], [0.0, 0.0]), 32, 32)
        shift = round(45.0 * 32 / angle)
        assert torch.equal(second[..., : 32 - shift], first[..., shift:])


def test_elevation_moves_rows_without_a_jump_at_the_horizon():
    size = 64
    step = 180.0 / size
    elevations = [90.0 - step * k for k in range(size + 1)]
    windows = world_map_crop(world(180.0, size, size + 1), views([0.0] * (size + 1), elevations), size, size)
    for upper, lower in pairwise(windows):
        assert torch.equal(lower[:, :-1], upper[:, 1:])
    assert torch.equal(windows[0], world(180.0, size)[0, :, :size, :size])


def test_map_cells_move_as_the_front_of_the_object_does():
    base, right, above = (views([30.0 + a], [10.0 + e]) for a, e in ((0.0, 0.0), (20.0, 0.0), (0.0, 20.0)))
    front = torch.tensor([math.cos(math.radians(30)), math.sin(math.radians(30)), 0.18, 1.0])

    def pixel(cameras) -> tuple[float, float]:
        x, y, z, _ = (torch.linalg.inv(cameras.c2w[0]) @ front).tolist()
        return x / -z, y / z  # column grows to the right, row downwards

    def cell(cameras) -> tuple[float, float]:
        maps = world(180.0, 32)
        marked = torch.zeros_like(maps)
        window = world_map_crop(maps, base, 32, 32)[0, 0]
        marked[:, 0][maps[:, 0] == window[16, 16]] = 1.0
        row, column = world_map_crop(marked, cameras, 32, 32)[0, 0].nonzero()[0].tolist()
        return column, row

    for moved in (right, above):
        for axis in (0, 1):
            surface, noise = pixel(moved)[axis] - pixel(base)[axis], cell(moved)[axis] - cell(base)[axis]
            assert (abs(surface) < 0.02 and noise == 0) or surface * noise > 0


def test_without_cameras_all_look_from_the_front():
    front = world_map_crop(world(batch=1), views([0.0], [0.0]), 16, 16)
    assert torch.equal(world_map_crop(world(batch=2), None, 16, 16), front.expand(2, -1, -1, -1))


def test_cover_is_half_a_cell():
    opacity = torch.zeros(1, 8, 8, 1)
    opacity[0, :4, :2], opacity[0, 4:, 4:6], opacity[0, 4:, 6:] = 1.0, 0.49, 0.51
    mask = covered(opacity.requires_grad_(), torch.empty(1, 4, 4, 4))
    expected = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    expected[..., :2, 0], expected[..., 2:, 3] = True, True
    assert torch.equal(mask, expected)
