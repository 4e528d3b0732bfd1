"""Gaussian data with known answers, for tests of where the optimization of a method converges.

The data are N(m, s^2 I) unless a test says otherwise; D(t) = alpha^2 s^2 + sigma^2 and lambda = sigma / alpha. The
exact denoiser is eps(x, t) = sigma (x - alpha m) / D. Every update is therefore linear in the particles, and their mean
and spread follow a closed recursion. All particles are items of one batch, and every element of a particle is an
independent sample: the standard error of a standard deviation over n samples is s / sqrt(2 n).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance import Guidance
from scoredist3d.priors import CFGConditions, Conditioning, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.prompts.processor import PromptProcessor
from shared.method_cases import gradient, method, views

M, S = 0.4, 0.6
SHAPE = (1, 4, 4)
PARTICLES = 64
SAMPLES = PARTICLES * 16
ERROR = S / math.sqrt(2 * SAMPLES)
"""Standard error of the measured spread, 0.013."""


def mixture(**components: tuple[float, float]) -> GaussianMixturePrior:
    """Prior with named Gaussians, each given as (mean, std) of every element; the empty prompt selects all of them."""
    means, stds = (
        torch.tensor([value[index] for value in components.values()], dtype=torch.float64)[:, None, None, None]
        for index in (0, 1)
    )
    labels = tuple(frozenset({name}) for name in components)
    parts = Mixture(means.expand(-1, *SHAPE), stds, torch.ones(len(components), dtype=torch.float64), labels)
    return GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=parts)


def gaussian(mean: float = M, std: float = S) -> GaussianMixturePrior:
    return mixture(thing=(mean, std))


def between(prior: GaussianMixturePrior, positive: str, other: str = "", **extra: str) -> CFGConditions:
    """CFG conditions with one prompt, guided away from another."""
    return CFGConditions(
        prior.embed([positive]),
        prior.embed([other]),
        plain=prior.embed([positive]),
        empty=prior.embed([""]),
        extra={name: prior.embed([text]) for name, text in extra.items()},
    )


def normal(count: int = PARTICLES, seed: int = 0) -> Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coefficients(prior: GaussianMixturePrior, timestep: float) -> tuple[float, float, float]:
    """alpha, sigma and lambda at a timestep."""
    alpha, sigma = (c.item() for c in prior.schedule.coefficients(torch.tensor([timestep], dtype=torch.float64)))
    return alpha, sigma, sigma / alpha


def anneal(guidance: Guidance, z: Tensor, timesteps: list[float], conditions: CFGConditions, **extras: Any) -> Tensor:
    """Apply z <- z - (lambda_t - lambda_p) (eps_hat - noise) along the timesteps, which is DDIM for the initial noise.

    The method must be weighted uniformly and its timesteps annealed along ``timesteps``, one per step.
    """
    ratios = [coefficients(guidance.prior, timestep)[2] for timestep in timesteps]
    for step, (start, stop) in enumerate(pairwise(ratios)):
        z = z - (start - stop) * gradient(guidance, z, step, conditions=conditions, **extras)
    return z


def linear_end(
    prior: GaussianMixturePrior, timesteps: list[float], parts: list[tuple[float, float, float]]
) -> tuple[float, float, float]:
    """Result of :func:`anneal` from z = 0 for eps_hat = sum_i w_i eps_i; ``parts`` holds (w, mean, std) of each term.

    With k = sum w_i / D_i and h = sum w_i m_i / D_i, a step is z <- (1 - d sigma alpha k) z + d sigma alpha h + d (1 -
    sigma^2 k) n. Returns the mean, and the spread over particles for fixed noise (the contributions of the steps add)
    and for fresh noise (their squares add).
    """
    mean, kept, variance = 0.0, 0.0, 0.0
    for start, stop in pairwise(timesteps):
        alpha, sigma, ratio = coefficients(prior, start)
        d = ratio - coefficients(prior, stop)[2]
        spreads = [alpha**2 * std**2 + sigma**2 for _, _, std in parts]
        k = sum(w / spread for (w, _, _), spread in zip(parts, spreads, strict=True))
        h = sum(w * m / spread for (w, m, _), spread in zip(parts, spreads, strict=True))
        shrink, noise = 1 - d * sigma * alpha * k, d * (1 - sigma**2 * k)
        mean = shrink * mean + d * sigma * alpha * h
        kept = shrink * kept + noise
        variance = shrink**2 * variance + noise**2
    return mean, abs(kept), math.sqrt(variance)


def falling(steps: int) -> tuple[list[float], dict[str, Any]]:
    """Timesteps 0.98 ... 0, then the clean image, and the options that make a method follow them."""
    span = {"from": 0.98, "to": 0.0, "end": steps - 1}
    timesteps = [round(0.98 - 0.98 * k / (steps - 1), 3) for k in range(steps)]
    return [*timesteps, -1.0], {"t_min": span, "t_max": span, "guidance_scale": 1.0}


def descend(
    guidance: Guidance, z: Tensor, steps: int, rate: Callable[[float], float], conditions: CFGConditions, **extras: Any
) -> Tensor:
    """Plain gradient descent; ``rate`` is a function of progress in [0, 1]."""
    for step in range(steps):
        z = z - rate(step / steps) * gradient(guidance, z, step, conditions=conditions, **extras)
    return z


class ExactPhi(nn.Module):
    """Exact score model: without a camera the denoiser of N(mean, std^2) fitted to all elements of the particles.

    With a camera (or if ``dirac``) it is the denoiser of each particle alone, which predicts exactly the added noise.
    """

    def __init__(self, prior: GaussianMixturePrior) -> None:
        super().__init__()
        self.prior, self.z, self.dirac = [prior], torch.zeros(0), False

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Prediction by the formula in the docstring of this module."""
        schedule = self.prior[0].schedule
        alpha, sigma = (per_item(c, x_t) for c in schedule.coefficients(t))
        alone = (x_t - alpha * torch.cat([self.z] * (len(x_t) // len(self.z)))) / sigma
        together = sigma * (x_t - alpha * self.z.mean()) / (alpha**2 * self.z.var() + sigma**2)
        seen = (conditioning.camera.abs().sum(1) > 0) | self.dirac
        return Prediction(torch.where(seen[:, None, None, None], alone, together), "epsilon", x_t, t, schedule)


def variational(name: str, prior: GaussianMixturePrior, **options: Any) -> tuple[Guidance, ExactPhi]:
    """A variational method with an exact score model, which is not trained."""
    guidance: Any = method(name, prior, **options)
    phi = ExactPhi(prior)
    guidance.phi = phi
    guidance.update = lambda z, conditions, step: {}
    return guidance, phi


def default_conditions(guidance: Guidance) -> CFGConditions:
    """Conditions of a prompt without view words and negative prompt, with the method's extra prompts."""
    extra = guidance.extra_prompts("red")
    return PromptProcessor(PromptProcessor.Config(), prior=guidance.prior, prompt="red", extra=extra)()


def seen_from_everywhere(conditions: CFGConditions, count: int) -> CFGConditions:
    return dataclasses.replace(conditions, cameras=views(count))
