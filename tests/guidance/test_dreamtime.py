"""DreamTime: the schedule t(i) against its definition, and its use as an option of methods."""

import math
from itertools import pairwise

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents, method

from scoredist3d.config.validation import parse_component
from scoredist3d.diffusion.schedule import FlowSchedule, VPSchedule
from scoredist3d.guidance.core.dreamtime import DreamTime, DreamTimeConfig, time_prior
from scoredist3d.seeding import Rng

VP = VPSchedule.stable_diffusion()
KINDS = ("plateau", "snr", "uniform")
SCHEDULES = {"vp": VP, "flow": FlowSchedule(shift=3.0)}


def dreamtime(steps: int, schedule=VP, low: float = 0.02, high: float = 0.98, **options) -> DreamTime:
    return DreamTime(DreamTimeConfig(steps=steps, **options), schedule, low, high)


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_papers_argmin_starts_at_the_top_and_never_rises(kind, family):
    schedule, steps = SCHEDULES[family], 137
    timesteps = [dreamtime(steps, schedule, kind=kind)(step) for step in range(steps + 20)]
    grid = torch.arange(20, 981, dtype=torch.float64) / 1000
    weights = time_prior(DreamTimeConfig(kind=kind), schedule, grid)
    p = weights / weights.sum()
    at_or_above = torch.stack([p[k:].sum() for k in range(len(p))])
    for step in range(steps + 1):
        gap = (at_or_above - step / steps).abs()
        reached = gap[(grid - timesteps[step]).abs().argmin()]
        assert reached <= gap.min() + 1e-12
    assert timesteps[0] == 0.98 and all(a >= b for a, b in pairwise(timesteps))
    # The run ends at the lowest timestep, or at a timestep below which the weights vanish.
    assert timesteps[-1] == timesteps[steps] and p[: round(timesteps[steps] * 1000) - 20].sum() < 1e-9


def test_weights_are_the_papers():
    t = torch.tensor([0.3, 0.5, 0.65, 0.8, 0.95], dtype=torch.float64)
    plateau = time_prior(DreamTimeConfig(), VP, t)
    expected = [math.exp(-(0.2**2) / (2 * 0.1**2)), 1, 1, 1, math.exp(-(0.15**2) / (2 * 0.3**2))]
    torch.testing.assert_close(plateau, torch.tensor(expected, dtype=torch.float64))
    abar = VP.alpha(t) ** 2
    snr = ((1 - abar) / abar).sqrt() * torch.exp(-((t - 0.5) ** 2) / (2 * 0.125**2))
    torch.testing.assert_close(time_prior(DreamTimeConfig(kind="snr"), VP, t), snr)


def test_uniform_weights_fall_linearly():
    steps = 500
    fall = dreamtime(steps, kind="uniform")
    worst = max(abs(fall(step) - (0.98 - 0.96 * step / steps)) for step in range(steps + 1))
    assert worst < 1.6e-3  # the weight of the first timestep, and rounding by half a timestep


def test_timesteps_get_their_share_of_the_steps():
    steps = 20000
    config = DreamTimeConfig(steps=steps)
    fall = DreamTime(config, VP, 0.02, 0.98)
    grid = torch.arange(20, 981, dtype=torch.float64) / 1000
    p = time_prior(config, VP, grid)
    p = p / p.sum()
    timesteps = torch.tensor([fall(step) for step in range(steps)], dtype=torch.float64)
    for low, high in ((0.1, 0.4), (0.4, 0.6), (0.7, 0.9)):
        share = ((timesteps >= low) & (timesteps < high)).double().mean()
        assert abs(share - p[(grid >= low) & (grid < high)].sum()) < 2 * p.max() + 1 / steps


def test_every_item_of_every_method_follows_it():
    guidance = method("sds", CountingPrior(), dreamtime={"steps": 40})
    timesteps = [guidance.sample_timesteps(3, step, Rng(step)) for step in range(45)]
    assert timesteps == [[dreamtime(40)(step)] * 3 for step in range(45)]
    by_schedule = method("sds", CountingPrior(), t_min=timesteps[7][0], t_max=timesteps[7][0])
    z = latents(2)
    assert torch.equal(gradient(guidance, z, 7), gradient(by_schedule, z, 7))
    random = method("sds", CountingPrior())
    assert len(set(random.sample_timesteps(3, 0, Rng()))) == 3  # off by default


def test_mistakes_are_named():
    base = {"type": "sds", "dreamtime": {"steps": 10}}
    falling = {"from": 0.98, "to": 0.3, "end": 9}
    for wrong in ({"t_max": falling}, {"t_min": falling, "t_max": falling}, {"t_min": 0.5, "t_max": 0.4}):
        with pytest.raises(ValueError, match="dreamtime: needs a constant timestep range"):
            parse_component("guidance", {**base, **wrong})
    with pytest.raises(ValueError, match=r"dreamtime\.m2: 0\.9 is above m1 0\.8; lower m2 or raise m1"):
        parse_component("guidance", {"type": "sds", "dreamtime": {"steps": 10, "m2": 0.9}})
    with pytest.raises(ValueError, match="lower t_max below the timestep at which the noisy input has no signal"):
        dreamtime(10, FlowSchedule(), high=1.0, kind="snr")
    with pytest.raises(ValueError, match="or increase s, s1 and s2"):
        dreamtime(10, low=0.02, high=0.03, kind="plateau", s2=0.001)
