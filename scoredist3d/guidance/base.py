"""What every distillation method shares: levels, noise, weights, the surrogate loss, checks and previews."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, Schedule, option
from scoredist3d.guidance.checks import FiniteCheck
from scoredist3d.noise import NoiseSchedule, per_item
from scoredist3d.priors.base import Branches, Prediction, Prior, guided_prediction
from scoredist3d.priors.sampling import denoise
from scoredist3d.seeding import Rng

Weighting = Literal["sds", "uniform", "fantasia3d", "lambda", "flow"]

WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sds": lambda alpha, sigma: sigma.square(),
    "uniform": lambda alpha, sigma: torch.ones_like(sigma),
    "fantasia3d": lambda alpha, sigma: alpha * sigma.square(),
    "lambda": lambda alpha, sigma: sigma / alpha,
    "flow": lambda alpha, sigma: 1.0 / alpha,
}
"""w(alpha, sigma) in front of a difference of noise predictions."""


@dataclass(frozen=True)
class GuidanceStep:
    """One step's circumstances, the same for every method.

    Attributes:
        step: Optimiser step.
        t: (B,) levels, snapped to the model's.
        levels: The same as Python numbers, for control flow that must not wait for the device.
        rng: The run's randomness; see :meth:`noise`.
        rgb: (B, H, W, 3) images that were encoded, attached to the graph, where the caller has them.
        opacity: (B, H, W, 1) of the render, where there is one.
        particles: (B,) index of the particle that each item shows, for methods with state per particle.
    """

    step: int
    t: Tensor
    levels: tuple[float, ...]
    rng: Rng
    rgb: Tensor | None = None
    opacity: Tensor | None = None
    particles: Tensor | None = None

    def noise(self, like: Tensor, stream: str = "noise") -> Tensor:
        """Gaussian noise in the shape of ``like``; item i depends on (seed, stream, step, i) only, not on the batch."""
        return item_noise(self.rng, stream, self.step, like)


@dataclass(frozen=True)
class Score:
    """What a method computes for one step, all detached.

    Attributes:
        gradient: (B, C, h, w), dL/dz of each item; the base clips it and divides by the batch.
        rgb_gradient: (B, H, W, 3), a further gradient for ``GuidanceStep.rgb``, for image-space terms.
        diagnostics: Further values to log.
    """

    gradient: Tensor
    rgb_gradient: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GuidanceOutput:
    """Attributes:
    loss: Scalar whose gradient with respect to z is the method's, divided by the batch size.
    diagnostics: Detached one-element tensors, still on their device.
    """

    loss: Tensor
    diagnostics: dict[str, Tensor]


class Guidance(nn.Module, ABC):
    """A distillation method: noised latents and conditionings in, a gradient for the clean latents out.

    Subclasses implement :meth:`score_gradient`, a few lines over the prior. Methods that train something of their own
    keep it as parameters here, step it in :meth:`update` with an optimiser of their own, and save that in
    ``get_extra_state``.

    Item i of a batch draws its level and noise from generators derived from (seed, step, i): its gradient does not
    depend on how many items come with it, and a resumed run repeats them.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of every method."""

        weight: Schedule = option(1.0, "Factor of the guidance loss.", ge=0)
        guidance_scale: Schedule = option(7.5, "gamma of eps_u + gamma (eps_c - eps_u), the meaning of diffusers.")
        guidance_rescale: float = option(
            0.0, "Share of the guided image that is scaled back to the contrast of the conditional one.", ge=0, le=1
        )
        t_min: Schedule = option(0.02, "Lowest noise level, as a share of the model's.", ge=0, le=1)
        t_max: Schedule = option(
            0.98,
            "Highest noise level; give t_min the same schedule to anneal a single level.",
            ge=0,
            le=1,
        )
        weighting: Weighting = option(
            "sds",
            "w(t) before the noise difference: sds sigma^2, uniform 1, fantasia3d alpha sigma^2, lambda sigma/alpha "
            "(the gradient of regression to the predicted image), flow 1/alpha (that of velocity regression).",
        )
        grad_clip: Schedule | None = option(None, "Clamp every element of the gradient to +- this value.", gt=0)

        def validate(self) -> list[str]:
            """The level range may not be empty at any step."""
            low, high = self.t_min, self.t_max
            steps = sorted({low.start, low.end, high.start, high.end, (low.start + low.end) // 2})
            wrong = [step for step in steps if low(step) > high(step)]
            if not wrong:
                return []
            return [f"t_min: {low(wrong[0]):g} is above t_max {high(wrong[0]):g} at step {wrong[0]}"]

    def __init__(self, config: Config, *, prior: Prior) -> None:
        super().__init__()
        self.config = config
        # Outside of the module tree: the frozen prior belongs in no state_dict.
        self._outside: tuple[Prior] = (prior,)
        self._check = FiniteCheck()

    @property
    def prior(self) -> Prior:
        """The frozen diffusion model."""
        return self._outside[0]

    @property
    def schedule(self) -> NoiseSchedule:
        """The prior's noise schedule."""
        return self.prior.schedule

    @abstractmethod
    def score_gradient(self, z: Tensor, branches: Branches, step: GuidanceStep) -> Score:
        """The method: dL/dz for detached (B, C, h, w) latents. Called without gradients."""

    def update(self, z: Tensor, branches: Branches, step: GuidanceStep) -> dict[str, Tensor]:
        """Train what the method owns on detached latents; returns values to log. Called once per forward pass."""
        return {}

    def forward(
        self,
        z: Tensor,
        branches: Branches,
        step: int,
        rng: Rng,
        *,
        rgb: Tensor | None = None,
        opacity: Tensor | None = None,
        particles: Tensor | None = None,
    ) -> GuidanceOutput:
        """The distillation loss of a batch.

        Its value is sum ||G||^2 / (2 B) and its gradient with respect to z is exactly G / B, as those of
        0.5 ||z - stopgrad(z - G)||^2 / B, without rounding z - G.

        Args:
            z: (B, C, h, w), latents attached to the graph.
            branches: The conditionings, of B items or of one.
            step: Optimiser step.
            rng: The run's randomness.
            rgb, opacity, particles: See :class:`GuidanceStep`.

        Raises:
            NonFiniteError: The latents or the gradient hold NaN or infinity (on CUDA: did so in the step before).
        """
        self._check.collect()
        self._check(step, "the latents of the render", z.detach())
        latents = z.detach()
        context = self.begin(latents, step, rng, rgb=rgb, opacity=opacity, particles=particles)
        with torch.no_grad():
            score = self.score_gradient(latents, branches, context)
            gradient = self._clipped(score.gradient, step)
        self._check(step, f"the gradient of {type(self).__name__}", gradient)
        loss = surrogate_loss(z, gradient)
        if score.rgb_gradient is not None and rgb is not None:
            loss = loss + surrogate_loss(rgb, score.rgb_gradient)
        diagnostics = {
            "t": context.t.mean(),
            "gradient_rms": gradient.square().mean().sqrt(),
            "latent_rms": latents.square().mean().sqrt(),
            **score.diagnostics,
            **self.update(latents, branches, context),
        }
        return GuidanceOutput(
            loss * self._value("weight", step), {key: value.detach() for key, value in diagnostics.items()}
        )

    def begin(self, z: Tensor, step: int, rng: Rng, **extras: Tensor | None) -> GuidanceStep:
        """The circumstances of a step: levels from ``rng``, and what the caller passes on."""
        levels = self.sample_levels(len(z), step, rng)
        return GuidanceStep(step, torch.tensor(levels, dtype=z.dtype).to(z.device), tuple(levels), rng, **extras)

    def sample_levels(self, batch: int, step: int, rng: Rng) -> list[float]:
        """Uniform draws from [t_min(step), t_max(step)], snapped; images that the prior sees jointly share one.

        Raises:
            ValueError: The range is empty at this step.
        """
        low, high = self._value("t_min", step), self._value("t_max", step)
        if low > high:
            raise ValueError(f"guidance.t_min is {low:g} at step {step}, above t_max {high:g}")
        groups = range(-(-batch // self.prior.views))
        draws = [torch.rand((), generator=rng(f"t/{group}", step), dtype=torch.float64) for group in groups]
        snapped: list[float] = self.schedule.snap(low + (high - low) * torch.stack(draws)).tolist()
        return [level for level in snapped for _ in range(self.prior.views)][:batch]

    def guided(self, x_t: Tensor, branches: Branches, step: GuidanceStep) -> Prediction:
        """The prior's prediction at the step's level, scale and rescale."""
        scale = self._value("guidance_scale", step.step)
        return guided_prediction(self.prior, x_t, step.t, branches, scale, rescale=self.config.guidance_rescale)

    def noised(self, z: Tensor, step: GuidanceStep) -> tuple[Tensor, Tensor]:
        """(x_t, eps) with the step's own noise."""
        eps = step.noise(z)
        return self.schedule.add_noise(z, eps, step.t), eps

    def time_weight(self, t: Tensor) -> Tensor:
        """(B,), w(t) of the configured weighting."""
        return WEIGHTINGS[self.config.weighting](*self.schedule.coefficients(t))

    def weighted(self, prediction: Prediction, z: Tensor, eps: Tensor) -> Tensor:
        """w(t) (eps_hat - eps) for x_t = alpha z + sigma eps.

        For ``lambda`` the equal z - x0_hat is taken, which stays finite where alpha is 0.
        """
        if self.config.weighting == "lambda":
            return z - prediction.x0
        return per_item(self.time_weight(prediction.t), z) * (prediction.eps - eps)

    @torch.no_grad()
    def preview(
        self, z: Tensor, branches: Branches, step: int, rng: Rng, *, denoise_steps: int = 15, **extras: Any
    ) -> dict[str, Tensor]:
        """What the method saw at this step, as images (B, H, W, 3): noisy input, one-step and full denoising of it."""
        z = z.detach()
        context = self.begin(z, step, rng, **extras)
        x_t, _ = self.noised(z, context)
        one_step = self.guided(x_t, branches, context).x0
        scale = self._value("guidance_scale", step)
        full = torch.cat(
            [
                denoise(self.prior, x_t[item], level, select(branches, item, len(z)), steps=denoise_steps, scale=scale)
                for item, level in _groups(context.levels, self.prior.views)
            ]
        )
        images = {"noisy": x_t, "one_step": one_step, "denoised": full}
        return {name: self.prior.decode(latents).clamp(0.0, 1.0) for name, latents in images.items()}

    def _value(self, name: str, step: int) -> float:
        return getattr(self.config, name)(step)

    def _clipped(self, gradient: Tensor, step: int) -> Tensor:
        if self.config.grad_clip is None:
            return gradient
        limit = self._value("grad_clip", step)
        return gradient.clamp(-limit, limit)


def surrogate_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of value sum ||G||^2 / (2 B) whose gradient with respect to ``x`` is G / B."""
    along = ((x - x.detach()) * gradient).sum()
    return (along + 0.5 * gradient.square().sum()) / len(x)


def item_noise(rng: Rng, stream: str, step: int, like: Tensor) -> Tensor:
    """Gaussian noise in ``like``'s shape, dtype and device, every item from a generator of its own."""
    noise = torch.empty_like(like)
    for index, item in enumerate(noise):
        item.normal_(generator=rng(f"{stream}/{index}", step, like.device))
    return noise


def select(branches: Branches, items: slice, batch: int) -> Branches:
    """The branches of some items of a batch."""

    def pick(conditioning: Any) -> Any:
        return None if conditioning is None else conditioning.expand(batch)[items]

    return Branches(
        positive=pick(branches.positive),
        unconditional=pick(branches.unconditional),
        negatives=tuple((pick(c), weights.expand(batch)[items]) for c, weights in branches.negatives),
        plain=pick(branches.plain),
        empty=pick(branches.empty),
        cameras=None if branches.cameras is None else branches.cameras[items],
    )


def _groups(levels: tuple[float, ...], size: int) -> list[tuple[slice, float]]:
    return [(slice(start, start + size), levels[start]) for start in range(0, len(levels), size)]
