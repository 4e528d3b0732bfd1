"""What every distillation method shares: timesteps, noise, weights, the surrogate loss, checks and previews."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, FieldError, Schedule, option
from scoredist3d.diffusion.schedule import NoiseSchedule, per_item
from scoredist3d.guidance.core.checks import FiniteCheck
from scoredist3d.guidance.core.context import StepContext, select, timestep_tensor
from scoredist3d.guidance.core.dreamtime import DreamTime, DreamTimeConfig
from scoredist3d.priors.base import CFGConditions, Prediction, Prior, guided_prediction
from scoredist3d.priors.sampling import denoise
from scoredist3d.prompts.processor import ExtraPrompt
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
class Score:
    """What a method computes for one step, all detached.

    Attributes:
        gradient: (B, C, h, w), dL/dz of each item; the base clips it and divides by the batch.
        rgb_gradient: (B, H, W, 3), a further gradient for ``StepContext.rgb``, for image-space terms.
        diagnostics: Further values to log.
    """

    gradient: Tensor
    rgb_gradient: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class NFE:
    """Network evaluations of one step, per image of the batch.

    Attributes:
        prior: Rows of the frozen denoiser: 2 for one prediction with classifier-free guidance (a fraction where
            only some images of the batch need one).
        own: Rows of what the method trains itself, those of its training included.
    """

    prior: float
    own: int = 0


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

    Item i of a batch draws its timestep and noise from generators derived from (seed, step, i): its gradient does not
    depend on how many items come with it, and a resumed run repeats them.

    Attributes:
        needs_source: Whether the method edits, and ``StepContext.source`` must be given.
    """

    needs_source: bool = False

    @dataclass
    class Config(ComponentConfig):
        """Options of every method."""

        weight: Schedule = option(1.0, "Factor of the guidance loss.", ge=0)
        guidance_scale: Schedule = option(7.5, "gamma of eps_u + gamma (eps_c - eps_u), the meaning of diffusers.")
        guidance_rescale: float = option(
            0.0, "Share of the guided image that is scaled back to the contrast of the conditional one.", ge=0, le=1
        )
        t_min: Schedule = option(0.02, "Lowest timestep, as a share of the model's.", ge=0, le=1)
        t_max: Schedule = option(
            0.98,
            "Highest timestep; give t_min the same schedule to anneal a single timestep.",
            ge=0,
            le=1,
        )
        weighting: Weighting = option(
            "sds",
            "w(t) before the noise difference: sds sigma^2, uniform 1, fantasia3d alpha sigma^2, lambda sigma/alpha "
            "(the gradient of regression to the predicted image), flow 1/alpha (that of velocity regression).",
        )
        grad_clip: Schedule | None = option(None, "Clamp every element of the gradient to +- this value.", gt=0)
        dreamtime: DreamTimeConfig = field(
            default_factory=DreamTimeConfig,
            metadata={"help": "DreamTime: one timestep per step, falling from t_max to t_min."},
        )

        def validate(self) -> list[str]:
            """The timestep range may not be empty at any step, nor move under DreamTime."""
            low, high = self.t_min, self.t_max
            if self.dreamtime.steps and not (
                low.is_constant and high.is_constant and low.start_value <= high.start_value
            ):
                return ["dreamtime: anneals by itself; give t_min and t_max one number each, t_min the smaller"]
            steps = sorted({*low.steps, *high.steps, (low.start + low.end) // 2})
            wrong = [step for step in steps if low(step) > high(step)]
            if not wrong:
                return []
            return [f"t_min: {low(wrong[0]):g} is above t_max {high(wrong[0]):g} at step {wrong[0]}"]

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Args:
        config: Options.
        prior: The frozen diffusion model.
        rng: Initialises what the method trains; equal on all ranks.
        """
        super().__init__()
        self.config = config
        self.rng = (rng or Rng()).shared()
        # Outside of the module tree: the frozen prior belongs in no state_dict.
        self._outside: tuple[Prior] = (prior,)
        self._check = FiniteCheck()
        falls = config.dreamtime.steps > 0
        ends = config.t_min.start_value, config.t_max.start_value
        self._dreamtime = DreamTime(config.dreamtime, prior.schedule, *ends) if falls else None

    @property
    def prior(self) -> Prior:
        """The frozen diffusion model."""
        return self._outside[0]

    @property
    def schedule(self) -> NoiseSchedule:
        """The prior's noise schedule."""
        return self.prior.schedule

    @abstractmethod
    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """The method: dL/dz for detached (B, C, h, w) latents. Called without gradients."""

    def extra_prompts(self, prompt: str) -> dict[str, ExtraPrompt]:
        """Further texts the method needs, by the name under which ``CFGConditions.extra`` will hold their conditionings."""
        return {}

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Network evaluations of the step; a method that does more than one guided prediction says so here."""
        return NFE(self.guided_nfe(conditions, self._value("guidance_scale", ctx.step)))

    @staticmethod
    def guided_nfe(conditions: CFGConditions, scale: float) -> int:
        """Rows of the denoiser that one guided prediction takes per image; see :func:`guided_prediction`."""
        if scale == 0.0 or (scale == 1.0 and not conditions.negatives):
            return 1
        return 2 + len(conditions.negatives)

    def update(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> dict[str, Tensor]:
        """Train what the method owns on detached latents; returns values to log. Called once per forward pass."""
        return {}

    def forward(
        self,
        z: Tensor,
        conditions: CFGConditions,
        step: int,
        rng: Rng,
        *,
        rgb: Tensor | None = None,
        opacity: Tensor | None = None,
        particles: Sequence[int] | None = None,
        source: Tensor | None = None,
    ) -> GuidanceOutput:
        """The distillation loss of a batch.

        Its value is sum ||G||^2 / (2 B) and its gradient with respect to z is exactly G / B, as those of
        0.5 ||z - stopgrad(z - G)||^2 / B, without rounding z - G.

        Args:
            z: (B, C, h, w), latents attached to the graph.
            conditions: The conditionings, of B items or of one.
            step: Optimiser step.
            rng: The run's randomness.
            rgb, opacity, source: See :class:`StepContext`.
            particles: Number of the particle that each item shows; all show particle 0 by default.

        Raises:
            NonFiniteError: The latents or the gradient hold NaN or infinity (on CUDA: did so in the step before).
            ValueError: The method edits and no source is given.
        """
        if self.needs_source and source is None:
            raise ValueError(
                f"{self.config.type or type(self).__name__} edits something: it needs the source's latents"
            )
        self.check_finite()
        self._check(step, "the latents of the render", z.detach())
        latents = z.detach()
        context = self.begin(latents, step, rng, particles=particles, rgb=rgb, opacity=opacity, source=source)
        with torch.no_grad():
            score = self.score_gradient(latents, conditions, context)
            gradient = self._clipped(score.gradient, step)
        self._check(step, f"the gradient of {type(self).__name__}", gradient)
        if score.rgb_gradient is not None:
            self._check(step, f"the image gradient of {type(self).__name__}", score.rgb_gradient)
        loss = surrogate_loss(z, gradient)
        if score.rgb_gradient is not None and rgb is not None:
            loss = loss + surrogate_loss(rgb, score.rgb_gradient)
        diagnostics = {
            "t": context.t.mean(),
            "gradient_rms": gradient.square().mean().sqrt(),
            "latent_rms": latents.square().mean().sqrt(),
            **score.diagnostics,
            **self.update(latents, conditions, context),
        }
        return GuidanceOutput(
            loss * self._value("weight", step), {key: value.detach() for key, value in diagnostics.items()}
        )

    def check_finite(self) -> None:
        """Wait for the answers of finite checks that are still on their way from the device.

        Raises:
            NonFiniteError: One of them is negative.
        """
        self._check.collect()

    def begin(
        self, z: Tensor, step: int, rng: Rng, *, particles: Sequence[int] | None = None, **extras: Tensor | None
    ) -> StepContext:
        """The circumstances of a step: timesteps from ``rng``, and what the caller passes on."""
        timesteps = self.sample_timesteps(len(z), step, rng)
        shown = (0,) * len(z) if particles is None else tuple(particles)
        return StepContext(step, timestep_tensor(timesteps, z), tuple(timesteps), rng, shown, **extras)

    def sample_timesteps(self, batch: int, step: int, rng: Rng) -> list[float]:
        """Uniform draws from [t_min(step), t_max(step)], quantized; images that the prior sees jointly share one.

        With ``dreamtime`` all share its timestep of the step.

        Raises:
            ValueError: The range is empty at this step.
        """
        if self._dreamtime is not None:
            return [self._dreamtime(step)] * batch
        low, high = self._value("t_min", step), self._value("t_max", step)
        if low > high:
            raise FieldError(f"{low:g} at step {step} is above t_max {high:g}", "t_min")
        groups = range(-(-batch // self.prior.views))
        draws = [torch.rand((), generator=rng(f"t/{group}", step), dtype=torch.float64) for group in groups]
        quantized: list[float] = self.schedule.quantize(low + (high - low) * torch.stack(draws)).tolist()
        return [timestep for timestep in quantized for _ in range(self.prior.views)][:batch]

    def guided(
        self,
        x_t: Tensor,
        conditions: CFGConditions,
        ctx: StepContext,
        *,
        t: Tensor | None = None,
        scale: float | None = None,
    ) -> Prediction:
        """The prior's prediction under classifier-free guidance with the configured rescale.

        Args:
            x_t: (B, C, h, w).
            conditions: Of B items or one.
            ctx: Gives the timestep and, by the configured schedule, the scale where they are not given.
            t: (B,), another timestep.
            scale: Another guidance scale.
        """
        t = ctx.t if t is None else t
        scale = self._value("guidance_scale", ctx.step) if scale is None else scale
        return guided_prediction(self.prior, x_t, t, conditions, scale, rescale=self.config.guidance_rescale)

    def noised(self, z: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """(x_t, eps) with the step's own noise."""
        eps = ctx.noise(z)
        return self.schedule.add_noise(z, eps, ctx.t), eps

    def noisy_input(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """x_t as the prior sees it first, for previews; for methods with noise of their own to override."""
        return self.noised(z, ctx)[0]

    def time_weight(self, t: Tensor) -> Tensor:
        """(B,), w(t) of the configured weighting."""
        return WEIGHTINGS[self.config.weighting](*self.schedule.coefficients(t))

    def weighted(self, prediction: Prediction, z: Tensor, eps: Tensor) -> Tensor:
        """w(t) (eps_hat - eps) for x_t = alpha z + sigma eps.

        For ``lambda`` the equal z - x0_hat is taken and for ``flow`` v_hat - v, which stay finite where alpha is 0.
        """
        if self.config.weighting == "lambda":
            return z - prediction.x0
        if self.config.weighting == "flow":
            return prediction.v - self.schedule.velocity(z, eps, prediction.t)
        return per_item(self.time_weight(prediction.t), z) * (prediction.eps - eps)

    @torch.no_grad()
    def preview(
        self, z: Tensor, conditions: CFGConditions, step: int, rng: Rng, *, denoise_steps: int = 15, **extras: Any
    ) -> dict[str, Tensor]:
        """What the method saw at this step, as images (B, H, W, 3): noisy input, one-step and full denoising of it."""
        z = z.detach()
        context = self.begin(z, step, rng, **extras)
        x_t = self.noisy_input(z, conditions, context)
        one_step = self.guided(x_t, conditions, context).x0
        scale = self._value("guidance_scale", step)
        full = torch.cat(
            [
                denoise(
                    self.prior, x_t[item], timestep, select(conditions, item, len(z)), steps=denoise_steps, scale=scale
                )
                for item, timestep in _groups(context.timesteps, self.prior.views)
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


def _groups(timesteps: tuple[float, ...], size: int) -> list[tuple[slice, float]]:
    return [(slice(start, start + size), timesteps[start]) for start in range(0, len(timesteps), size)]
