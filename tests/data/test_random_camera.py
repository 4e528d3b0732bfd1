"""The random camera sampler."""

import math

import pytest
import torch

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.data.random_camera import RandomCamera
from scoredist3d.seeding import Rng


def sampler(world_size: int = 1, **options) -> RandomCamera:
    return registry.build(parse_component("data", {"type": "random-camera", **options}), world_size=world_size)


def test_default_builds_from_the_registry():
    cameras = sampler().sample(0, Rng())
    assert len(cameras) == 4 and (cameras.height, cameras.width) == (64, 64)


def test_draws_stay_in_their_ranges_and_fill_them():
    ranges = {
        "azimuth_range": (-30.0, 60.0),
        "elevation_range": (-20.0, 50.0),
        "distance_range": (2.0, 3.0),
        "fovy_range": (30.0, 50.0),
    }
    cameras = sampler(batch_size=4000, batch_uniform_azimuth=False, **ranges).sample(0, Rng())
    drawn = [cameras.azimuth.rad2deg(), cameras.elevation.rad2deg(), cameras.distance, cameras.fovy.rad2deg()]
    for values, (low, high) in zip(drawn, ranges.values(), strict=True):
        width = high - low
        assert values.min() >= low - 1e-4 and values.max() <= high + 1e-4
        # The chance that 4000 uniform draws miss an end by 1 % of the range is exp(-40).
        assert values.min() < low + 0.01 * width and values.max() > high - 0.01 * width
    torch.testing.assert_close(cameras.origins.norm(dim=-1), cameras.distance)


@pytest.mark.parametrize(("probability", "above_30_deg"), [(0.0, 2 / 3), (1.0, 0.5)])
def test_elevation_is_uniform_in_angle_or_in_area(probability, above_30_deg):
    """From 0 to 90 degrees: uniform in the angle puts 2/3 above 30 degrees, uniform in the area (sine) one half."""
    count = 4000
    cameras = sampler(batch_size=count, elevation_range=(0.0, 90.0), area_probability=probability).sample(0, Rng())
    share = (cameras.elevation > math.radians(30.0)).float().mean().item()
    assert abs(share - above_30_deg) < 5 * math.sqrt(0.25 / count)


def test_batch_uniform_azimuth_is_evenly_spaced_from_a_random_start():
    starts = []
    for step in range(40):
        azimuth = sampler(batch_size=4).sample(step, Rng()).azimuth.rad2deg().sort().values
        torch.testing.assert_close(azimuth.diff(), torch.full((3,), 90.0), atol=1e-3, rtol=0)
        starts.append(azimuth[0].item())
    assert min(starts) < -160 and max(starts) > -110  # spread over [-180, -90)


def test_ranks_fill_each_others_gaps_and_differ_otherwise():
    ranks = [sampler(world_size=2, batch_size=3).sample(5, Rng(seed=1, rank=rank)) for rank in range(2)]
    together = torch.cat([cameras.azimuth for cameras in ranks]).rad2deg().sort().values
    torch.testing.assert_close(together.diff(), torch.full((5,), 60.0), atol=1e-3, rtol=0)
    own = ranks[0].azimuth.rad2deg().sort().values
    torch.testing.assert_close(own.diff(), torch.full((2,), 120.0), atol=1e-3, rtol=0)
    assert not torch.equal(ranks[0].elevation, ranks[1].elevation)


def test_same_seed_and_step_same_cameras_whatever_was_drawn_before():
    first = sampler()
    for step in range(3):
        first.sample(step, Rng(seed=7))
    state = torch.random.get_rng_state()
    again = sampler().sample(2, Rng(seed=7))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.sample(2, Rng(seed=7)).c2w, again.c2w)
    assert not torch.equal(again.c2w, sampler().sample(3, Rng(seed=7)).c2w)
    assert not torch.equal(again.c2w, sampler().sample(2, Rng(seed=8)).c2w)


def test_milestones_change_batch_and_resolution():
    staged = sampler(batch_size=[4, 2], height=[16, 32], width=24, resolution_milestones=[100])
    sizes = {}
    for step in (0, 99, 100, 5000):
        cameras = staged.sample(step, Rng())
        sizes[step] = (len(cameras), cameras.height, cameras.width)
    assert sizes == {0: (4, 16, 24), 99: (4, 16, 24), 100: (2, 32, 24), 5000: (2, 32, 24)}


def test_relative_distance_keeps_the_size_in_the_image():
    cameras = sampler(batch_size=16, relative_distance=True, distance_range=(1.0, 1.0), fovy_range=(15.0, 60.0)).sample(
        0, Rng()
    )
    torch.testing.assert_close(cameras.distance * torch.tan(cameras.fovy / 2), torch.ones(16))


def test_jitter_is_off_by_default_and_moves_what_it_names():
    base = sampler(batch_size=64).sample(0, Rng())
    to_origin = -base.origins / base.origins.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(-base.c2w[:, :3, 2], to_origin)

    moved = sampler(batch_size=64, position_jitter=0.1).sample(0, Rng())
    shift = moved.origins - base.origins
    assert 0.05 < shift.abs().max() <= 0.1 + 1e-6

    turned = sampler(batch_size=64, target_jitter=0.2).sample(0, Rng())
    assert torch.equal(turned.origins, base.origins)
    assert (turned.c2w[:, :3, 2] - base.c2w[:, :3, 2]).norm(dim=-1).mean() > 0.02

    rolled = sampler(batch_size=64, up_jitter=0.1).sample(0, Rng())
    torch.testing.assert_close(rolled.c2w[:, :3, 2], base.c2w[:, :3, 2])
    assert rolled.c2w[:, 2, 0].abs().mean() > 0.02 and base.c2w[:, 2, 0].abs().max() < 1e-6


def test_evaluation_cameras():
    views = sampler(evaluation={"distance": 2.0, "fovy": 50.0}).evaluation([0, 90, 270], 20.0, 10, 12)
    torch.testing.assert_close(views.azimuth.rad2deg(), torch.tensor([0.0, 90.0, -90.0]), atol=1e-4, rtol=0)
    assert len(views) == 3 and (views.height, views.width) == (10, 12)
    torch.testing.assert_close(views.elevation.rad2deg(), torch.full((3,), 20.0))
    torch.testing.assert_close(views.origins.norm(dim=-1), torch.full((3,), 2.0))
    torch.testing.assert_close(views.fovy.rad2deg(), torch.full((3,), 50.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elevation_range": [50, 10]}, r"elevation_range: the first value must not exceed the second, got \[50, 10\]"),
        ({"fovy_range": [40, 200]}, "fovy_range"),
        ({"resolution_milestones": [200, 100]}, "resolution_milestones: must increase"),
        ({"height": [32, 64]}, "height: needs 1 values, one per stage of resolution_milestones, got 2"),
        ({"batch_size": 0}, "batch_size"),
        ({"area_probability": 1.5}, "area_probability"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        sampler(**options)


@pytest.mark.parametrize("batch", [3, 32, 200])
def test_spread_cameras_have_the_training_distribution_of_the_last_stage(batch):
    options = {"elevation_range": (-20.0, 40.0), "resolution_milestones": [5], "height": [16, 64], "width": [16, 48]}
    cameras = sampler(batch_size=batch, **options)
    found, again = cameras.spread(80), cameras.spread(80)
    assert len(found) == 80 and (found.height, found.width) == (64, 48)
    torch.testing.assert_close(found.c2w, again.c2w, rtol=0, atol=0)
    elevation, azimuth = torch.rad2deg(found.elevation), torch.rad2deg(found.azimuth)
    assert -20 <= elevation.min() < -15 and 35 < elevation.max() <= 40
    sectors = torch.histc(azimuth, 4, -180, 180)
    assert sectors.min() >= 12


def test_a_limited_number_of_views_is_visited_in_turn():
    cameras = sampler(num_views=6, batch_size=4, elevation_range=(0.0, 60.0), distance_range=(2.0, 3.0))
    batches = [cameras.sample(step, Rng(seed=3)) for step in range(3)]
    poses = torch.cat([batch.c2w for batch in batches])
    assert torch.equal(poses[:6], poses[6:])  # 12 views are two rounds
    assert len(poses[:6].flatten(1).unique(dim=0)) == 6
    other = cameras.sample(0, Rng(seed=4))
    assert not torch.equal(other.c2w, batches[0].c2w)


def test_a_limited_number_of_views_covers_the_ranges():
    views = sampler(num_views=64, batch_size=64, elevation_range=(-10.0, 50.0), area_probability=0.0)
    cameras = views.sample(7, Rng())
    elevation = cameras.elevation.rad2deg().sort().values
    edges = torch.arange(65) * (60.0 / 64) - 10.0
    assert (elevation >= edges[:-1] - 1e-3).all() and (elevation <= edges[1:] + 1e-3).all()  # one in each part
    for batch in sampler(num_views=64, batch_size=4).sample(2, Rng()).azimuth.rad2deg().sort().values.view(1, 4):
        gaps = torch.cat([batch.diff(), batch[:1] + 360.0 - batch[-1:]])
        assert gaps.max() < 140.0  # every batch looks from all sides


def test_ranks_share_a_limited_number_of_views():
    ranks = [sampler(world_size=2, num_views=8, batch_size=2).sample(1, Rng(seed=1, rank=rank)) for rank in range(2)]
    both = torch.cat([cameras.c2w for cameras in ranks])
    alone = sampler(num_views=8, batch_size=4).sample(1, Rng(seed=1)).c2w
    assert torch.equal(both, alone)
