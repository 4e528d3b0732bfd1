"""Score distillation via inversion, its timestep schedules and conditions for the tests of SDI."""

from __future__ import annotations

from scoredist3d.guidance.sdi import ScoreDistillationViaInversion as SDI
from scoredist3d.priors import CFGConditions


def sdi(prior, **options) -> SDI:
    return SDI(SDI.Config(**options), prior=prior)


def falling(start: float, end: float, last: int) -> dict:
    timesteps = {"from": start, "to": end, "end": last}
    return {"t_min": timesteps, "t_max": timesteps}


def at(timestep: float, **options) -> dict:
    return {"t_min": timestep, "t_max": timestep, **options}


def red(prior) -> CFGConditions:
    return CFGConditions(prior.embed(["red"]), prior.embed([""]))
