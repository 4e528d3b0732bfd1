"""Base class of distillation methods: options, timesteps, guided predictions, the loss, NaN checks and previews."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, FieldError, Schedule, option
from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.samplers import denoise
from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.guidance.core.checks import FiniteCheck
from scoredist3d.guidance.core.context import StepContext, select
from scoredist3d.guidance.core.dreamtime import DreamTime, DreamTimeConfig
from scoredist3d.guidance.core.outputs import NFE, GuidanceOutput, Score, surrogate_loss
from scoredist3d.guidance.core.timesteps import per_image, timestep_tensor, uniform_draws
from scoredist3d.guidance.core.weighting import Weighting, time_weight, weighted_difference
from scoredist3d.meshes.space_carving import DepthEstimates
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.prompts.processor import ExtraPrompt
from scoredist3d.seeding import Rng


class Guidance(nn.Module, ABC):
    """Base class of distillation methods, which compute a gradient for clean latents from a prior's predictions.

    Subclasses implement :meth:`score_gradient`. A method that trains a network registers it as a submodule, updates it
    in :meth:`update` with its own optimizer, and saves the optimizer's state in ``get_extra_state``.

    Item i of a batch draws its timestep and noise from generators derived from (seed, step, i). Its gradient therefore
    does not depend on the other items, and a resumed run draws the same values.

    Attributes:
        needs_source: Whether the method edits a source, so that ``StepContext.source`` is required.
    """

    needs_source: bool = False

    @dataclass
    class Config(ComponentConfig):
        """Options that all methods share."""

        weight: Schedule = option(1.0, "Weight of the guidance loss.", ge=0)
        guidance_scale: Schedule = option(
            7.5, "Guidance scale gamma in eps_u + gamma (eps_c - eps_u), as in diffusers."
        )
        guidance_rescale: float = option(
            0.0,
            "Blend factor from the guided image (0) to a copy with the standard deviation of the conditional one (1).",
            ge=0,
            le=1,
        )
        t_min: Schedule = option(0.02, "Lowest timestep, as a fraction of the prior's range.", ge=0, le=1)
        t_max: Schedule = option(
            0.98,
            "Highest timestep, as a fraction of the prior's range; give t_min the same schedule to anneal a single "
            "timestep.",
            ge=0,
            le=1,
        )
        weighting: Weighting = option(
            "sds",
            "Weight w(t) of the noise difference. sds: sigma^2; uniform: 1; fantasia3d: alpha sigma^2; lambda: "
            "sigma/alpha, which is regression to the predicted image; flow: 1/alpha, which is velocity regression.",
        )
        grad_clip: Schedule | None = option(None, "Clamp every element of the gradient to [-value, value].", gt=0)
        dreamtime: DreamTimeConfig = field(
            default_factory=DreamTimeConfig,
            metadata={"help": "DreamTime: one timestep per step, which decreases from t_max to t_min."},
        )

        def maps(self) -> frozenset[str]:
            """Optional maps of :class:`~scoredist3d.renderers.base.Render` that the method reads."""
            return frozenset()

        @property
        def carves(self) -> bool:
            """Whether the method carves the geometry at some steps; see :meth:`Guidance.depth_estimates`."""
            return False

        def validate(self) -> list[str]:
            """Require a timestep range that is nonempty at every step, and constant under DreamTime."""
            low, high = self.t_min, self.t_max
            if self.dreamtime.steps and not low.values[0] == low.values[1] <= high.values[0] == high.values[1]:
                return [
                    "dreamtime: needs a constant timestep range; set t_min and t_max to numbers with t_min <= t_max"
                ]
            steps = sorted({low.start, low.end, high.start, high.end, (low.start + low.end) // 2})
            wrong = [step for step in steps if low(step) > high(step)]
            if not wrong:
                return []
            step = wrong[0]
            return [f"t_min: {low(step):g} is above t_max {high(step):g} at step {step}; lower t_min or raise t_max"]

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method for a prior.

        Args:
            config: Options of the method.
            prior: Frozen diffusion model.
            rng: Random generators that initialize the method's networks; the same on all ranks.
        """
        super().__init__()
        self.config = config
        self.rng = (rng or Rng()).shared()
        self._prior = Unregistered(prior)
        self._check = FiniteCheck()
        anneals = config.dreamtime.steps > 0
        ends = config.t_min.start_value, config.t_max.start_value
        self._dreamtime = DreamTime(config.dreamtime, prior.schedule, *ends) if anneals else None

    @property
    def prior(self) -> Prior:
        """Frozen diffusion model."""
        return self._prior.value

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise schedule of the prior."""
        return self.prior.schedule

    @abstractmethod
    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient dL/dz for detached latents z (B, C, h, w); called under ``torch.no_grad``."""

    def extra_prompts(self, prompt: str) -> dict[str, ExtraPrompt]:
        """Extra texts to embed, by name; ``CFGConditions.extra`` holds their conditionings under the same names."""
        return {}

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """Network evaluations of the step; methods that do not make exactly one guided prediction override this."""
        return NFE(self.guided_nfe(conditions, self._value("guidance_scale", ctx.step)))

    @staticmethod
    def guided_nfe(conditions: CFGConditions, scale: float) -> int:
        """Evaluations of the denoiser per image for one guided prediction; see :func:`guided_prediction`."""
        if scale == 0.0 or (scale == 1.0 and not conditions.negatives):
            return 1
        return 2 + len(conditions.negatives)

    def reads_latents(self, step: int, cameras: Cameras, particles: Sequence[int]) -> bool:
        """Whether the step reads the latents of renders from these cameras.

        If not, the system may pass zeros instead of encoding the renders.

        Args:
            step: Optimizer step.
            cameras: (B) cameras.
            particles: Index of the particle that each of the B items shows.
        """
        return True

    def carves_at(self, step: int) -> bool:
        """Whether the geometry is carved before a step, by :meth:`depth_estimates`; the same on all ranks."""
        return False

    def depth_estimates(self, particle: int) -> DepthEstimates | None:
        """Estimated depths of a particle in the views that this rank knows; None if it knows none."""
        return None

    def update(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> dict[str, Tensor]:
        """Train the networks of the method on detached latents; called once per forward pass.

        Returns:
            Values to log.
        """
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
        depth: Tensor | None = None,
        particles: Sequence[int] | None = None,
        source: Tensor | None = None,
        background: Tensor | None = None,
        normal: Tensor | None = None,
    ) -> GuidanceOutput:
        """Distillation loss of a batch.

        Its value is sum ||G||^2 / (2 B) and its gradient with respect to z is G / B. These are the value and the
        gradient of 0.5 ||z - stopgrad(z - G)||^2 / B, computed without rounding z - G.

        Args:
            z: (B, C, h, w), latents attached to the graph.
            conditions: CFG conditions of B items or of one item.
            step: Optimizer step.
            rng: Random generators of the run.
            rgb, opacity, depth, source, background, normal: Fields of :class:`StepContext`.
            particles: Index of the particle that each item shows; particle 0 for all items by default.

        Raises:
            NonFiniteError: The render, its latents or the gradient contain NaN or infinity. On CUDA the error is raised
                one step later.
            ValueError: The method edits a source and ``source`` is None.
        """
        if self.needs_source and source is None:
            raise ValueError(f"guidance {self._name} edits a source: pass the latents of the source as source=")
        self.check_finite()
        if rgb is not None:
            self._check(step, "the render", rgb.detach())
        self._check(step, "the latents of the render", z.detach())
        latents = z.detach()
        shown = {"rgb": rgb, "opacity": opacity, "depth": depth, "background": background, "normal": normal}
        context = self.begin(latents, step, rng, particles=particles, source=source, **shown)
        with torch.no_grad():
            score = self.score_gradient(latents, conditions, context)
            # Before clipping, which would turn an infinite gradient into a finite one.
            self._check(step, f"the gradient of {self._name}", score.gradient)
            gradient = self._clipped(score.gradient, step)
        loss = surrogate_loss(z, gradient) + self._image_loss(score, context)
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

    def _image_loss(self, score: Score, ctx: StepContext) -> Tensor | float:
        """Loss with the image-space gradients of the score; 0 without any."""
        loss: Tensor | float = 0.0
        for name, image, gradient in (
            ("image", ctx.rgb, score.rgb_gradient),
            ("opacity", ctx.opacity, score.opacity_gradient),
            ("normal", ctx.normal, score.normal_gradient),
            ("depth", ctx.depth, score.depth_gradient),
        ):
            if gradient is not None:
                self._check(ctx.step, f"the {name} gradient of {self._name}", gradient)
                loss = loss if image is None else loss + surrogate_loss(image, gradient)
        return loss

    def check_finite(self) -> None:
        """Wait for the results of the checks for NaN and infinity that are still pending on the device.

        Raises:
            NonFiniteError: A check has failed.
        """
        self._check.collect()

    def begin(
        self,
        z: Tensor,
        step: int,
        rng: Rng,
        *,
        particles: Sequence[int] | None = None,
        rgb: Tensor | None = None,
        opacity: Tensor | None = None,
        depth: Tensor | None = None,
        source: Tensor | None = None,
        background: Tensor | None = None,
        normal: Tensor | None = None,
    ) -> StepContext:
        """Context of a step, with timesteps drawn from ``rng``; the other arguments are those of :meth:`forward`."""
        timesteps = self.sample_timesteps(len(z), step, rng)
        shown = (0,) * len(z) if particles is None else tuple(particles)
        t = timestep_tensor(timesteps, z)
        return StepContext(step, t, tuple(timesteps), rng, shown, rgb, opacity, depth, source, background, normal)

    def sample_timesteps(self, batch: int, step: int, rng: Rng) -> list[float]:
        """Timesteps of a batch: uniform draws from [t_min(step), t_max(step)], quantized to those of the prior.

        Images that the prior denoises jointly share a timestep. With ``dreamtime`` the whole batch has one timestep,
        which depends on the step only.

        Raises:
            ValueError: The range is empty at this step.
        """
        if self._dreamtime is not None:
            return [self._dreamtime(step)] * batch
        low, high = self._value("t_min", step), self._value("t_max", step)
        if low > high:
            raise FieldError(f"{low:g} is above t_max {high:g} at step {step}; lower t_min or raise t_max", "t_min")
        draws = uniform_draws(rng, "t", step, batch, self.prior.views)
        return per_image(self.schedule.quantize(low + (high - low) * draws), batch, self.prior.views)

    def guided(
        self,
        x_t: Tensor,
        conditions: CFGConditions,
        ctx: StepContext,
        *,
        t: Tensor | None = None,
        scale: float | None = None,
    ) -> Prediction:
        """Prediction of the prior with classifier-free guidance and the configured rescaling.

        Args:
            x_t: (B, C, h, w), noisy latents.
            conditions: CFG conditions of B items or of one item.
            ctx: Context of the step.
            t: (B,), timesteps of ``x_t``; ``ctx.t`` by default.
            scale: Guidance scale; ``guidance_scale`` at this step by default.
        """
        t = ctx.t if t is None else t
        scale = self._value("guidance_scale", ctx.step) if scale is None else scale
        return guided_prediction(self.prior, x_t, t, conditions, scale, rescale=self.config.guidance_rescale)

    def noised(self, z: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Noisy latents x_t and their noise eps, with fresh noise for each step."""
        eps = ctx.noise(z)
        return self.schedule.add_noise(z, eps, ctx.t), eps

    def noisy_input(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """First noisy input x_t to the prior, shown in previews; methods with other noise override this."""
        return self.noised(z, ctx)[0]

    def time_weight(self, t: Tensor) -> Tensor:
        """Weight w(t) (B,) of the configured weighting."""
        return time_weight(self.config.weighting, self.schedule, t)

    def weighted(self, prediction: Prediction, z: Tensor, eps: Tensor) -> Tensor:
        """Weighted noise difference w(t) (eps_hat - eps) for x_t = alpha z + sigma eps."""
        return weighted_difference(self.config.weighting, self.schedule, prediction, z, eps)

    @torch.no_grad()
    def preview(
        self,
        z: Tensor,
        conditions: CFGConditions,
        step: int,
        rng: Rng,
        *,
        denoise_steps: int = 15,
        particles: Sequence[int] | None = None,
        source: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Noisy input of a step, its one-step prediction and its full denoising, as (B, H, W, 3) images in [0, 1]."""
        z = z.detach()
        context = self.begin(z, step, rng, particles=particles, source=source)
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

    @property
    def _name(self) -> str:
        """Name of the method in messages."""
        return self.config.type or type(self).__name__

    def _value(self, name: str, step: int) -> float:
        return getattr(self.config, name)(step)

    def _clipped(self, gradient: Tensor, step: int) -> Tensor:
        if self.config.grad_clip is None:
            return gradient
        limit = self._value("grad_clip", step)
        return gradient.clamp(-limit, limit)


def _groups(timesteps: tuple[float, ...], size: int) -> list[tuple[slice, float]]:
    return [(slice(start, start + size), timesteps[start]) for start in range(0, len(timesteps), size)]
