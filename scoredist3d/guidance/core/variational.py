"""Shared base of variational methods, which train a second network phi on the renders."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, distributed

from scoredist3d.config import FieldError
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.score_models import (
    ScoreModelConfig,
    build_score_model,
    matching_output,
    phi_conditioning,
)
from scoredist3d.guidance.core.timesteps import per_image, timestep_tensor, uniform_draws
from scoredist3d.nn.ranks import average_over_ranks
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.seeding import Rng


class VariationalGuidance(Guidance):
    """Base class of methods with G = w(t) (eps_hat(x_t, t, y) - eps_phi(x_t, t, c, y)) and phi trained on the renders.

    Each step first computes G with the current phi. It then trains phi to denoise the same latents, with fresh noise
    and with timesteps drawn from the whole schedule:

        L_phi = E_{t, eps} || eps_phi(alpha_t z + sigma_t eps, t, c, y) - eps ||^2

    in the parametrization of phi's output. phi is conditioned on the prompt without view words and on the camera c, and
    uses no classifier-free guidance. All particles share it. Its weights and its optimizer's state are in the
    ``state_dict``.

    Attributes:
        phi: A :class:`~scoredist3d.guidance.core.score_models.ScoreModel`; a model without parameters
            is not trained.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options that variational methods share."""

        phi: ScoreModelConfig = field(
            default_factory=ScoreModelConfig,
            metadata={"help": "Score model that learns the distribution of the renders."},
        )

    config: Config
    phi: Any

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        """Create the method and its score model; for the arguments see :class:`Guidance`."""
        super().__init__(config, prior=prior, rng=rng)
        self.phi = build_score_model(config.phi, prior, self.rng)
        self._optimizer: torch.optim.AdamW | None = None
        self._optimizer_state: dict[str, Any] = {}
        self._replay: dict[str, Tensor] = {}

    @abstractmethod
    def camera_scale(self, step: int) -> float:
        """Camera scale gamma_phi, in eps_phi(no camera) + gamma_phi (eps_phi(camera) - eps_phi(no camera))."""

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient w(t) (eps_hat - eps_phi), with both predictions at the same x_t."""
        x_t, _ = self.noised(z, ctx)
        phi = self.phi_prediction(x_t, ctx, conditions)
        return Score(self.weighted(self.guided(x_t, conditions, ctx), phi.x0, phi.eps))

    def phi_prediction(self, x_t: Tensor, ctx: StepContext, conditions: CFGConditions) -> Prediction:
        """Prediction of phi with the configured camera scale."""
        conditioning = phi_conditioning(conditions, len(x_t))
        scale = self.camera_scale(ctx.step)
        if scale == 1.0:
            return self._phi(x_t, ctx.t, conditioning)
        if scale == 0.0:
            return self._phi(x_t, ctx.t, conditioning.without_camera())
        both = self._phi(
            x_t.repeat(2, 1, 1, 1), ctx.t.repeat(2), Conditioning.cat([conditioning, conditioning.without_camera()])
        )
        aware, blind = both.output.chunk(2)
        return Prediction(blind + scale * (aware - blind), both.kind, x_t, ctx.t, both.schedule)

    def update(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> dict[str, Tensor]:
        """Train phi on the latents; returns its mean loss."""
        if not self.phi_nfe():
            return {}
        conditioning = phi_conditioning(conditions, len(z))
        if self.config.phi.replay:
            self._remember(z, conditioning)
        losses = [self._train_phi(z, conditioning, conditions, ctx, index) for index in range(self.config.phi.steps)]
        return {"phi_loss": torch.stack(losses).mean()}

    def phi_loss(self, prediction: Prediction, z: Tensor, eps: Tensor, conditions: CFGConditions, step: int) -> Tensor:
        """Squared error of phi at x_t = alpha z + sigma eps, averaged over all elements.

        Args:
            prediction: Prediction of phi, attached to the graph; (B', C, h, w), where each item of the batch occurs
                ``phi.repeats`` times.
            z, eps: (B', C, h, w), clean latents and noise.
            conditions: CFG conditions of B items or of one item.
            step: Optimizer step.
        """
        return (prediction.output - matching_output(prediction, z, eps)).square().mean()

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction of the prior; one or two predictions of phi, plus the evaluations for its training."""
        predictions = 1 if self.camera_scale(ctx.step) in (0.0, 1.0) else 2
        return NFE(super().nfe(conditions, ctx).prior, predictions + self.phi_nfe())

    def phi_nfe(self) -> int:
        """Training evaluations of phi per image and step; 0 if phi has no trainable parameters."""
        phi = self.config.phi
        return phi.steps * phi.repeats if any(p.requires_grad for p in self.phi.parameters()) else 0

    def get_extra_state(self) -> dict[str, Any]:
        """State of phi's optimizer and the replay buffer of latents."""
        state = self._optimizer_state if self._optimizer is None else self._optimizer.state_dict()
        return {"optimizer": state, "replay": self._replay}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by :meth:`get_extra_state`."""
        self._optimizer, self._optimizer_state = None, copy.deepcopy(state["optimizer"])
        self._replay = dict(state["replay"])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move the module; the optimizer is rebuilt at the next step, so that its state follows the parameters."""
        self._optimizer_state, self._optimizer = self.get_extra_state()["optimizer"], None
        return super()._apply(fn, recurse)

    def _phi(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        prediction: Prediction = self.phi.predict(x_t, t, conditioning)
        return prediction

    def _train_phi(
        self, z: Tensor, conditioning: Conditioning, conditions: CFGConditions, ctx: StepContext, index: int
    ) -> Tensor:
        """One optimizer step of phi; returns its loss."""
        if self.config.phi.replay:
            z, conditioning = self._recall(z, conditioning, ctx, index)
        draws = [f"phi/{index}/{repeat}" for repeat in range(self.config.phi.repeats)]
        t = timestep_tensor([timestep for draw in draws for timestep in self._phi_timesteps(len(z), ctx, draw)], z)
        eps = torch.cat([ctx.noise(z, f"{draw}/noise") for draw in draws])
        repeated = Conditioning.cat([self._with_dropped_cameras(conditioning, ctx, draw) for draw in draws])
        clean = z.repeat(len(draws), 1, 1, 1)
        with torch.enable_grad():
            prediction = self._phi(self.schedule.add_noise(clean, eps, t), t, repeated)
            loss = self.phi_loss(prediction, clean, eps, conditions, ctx.step)
        self._descend(loss, clean.numel(), ctx.step)
        return loss.detach()

    def _descend(self, loss: Tensor, elements: int, step: int) -> None:
        """One AdamW step with the gradient averaged over all ranks."""
        optimizer = self._built_optimizer()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        # In half precision the gradient of a mean over many elements underflows; the gradient of their sum does not.
        (loss * elements).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        average_over_ranks(gradients)
        torch._foreach_div_(gradients, float(elements))
        self._check(step, "the gradient of phi", torch.stack(torch._foreach_norm(gradients)))
        for group in optimizer.param_groups:
            group["lr"] = self.config.phi.lr(step)
        optimizer.step()

    def _built_optimizer(self) -> torch.optim.AdamW:
        """Optimizer of phi, built at its first use, when the parameters are on their final device."""
        if self._optimizer is None:
            trained = [p for p in self.phi.parameters() if p.requires_grad]
            self._optimizer = torch.optim.AdamW(trained, weight_decay=self.config.phi.weight_decay)
            if self._optimizer_state:
                self._optimizer.load_state_dict(self._optimizer_state)
        return self._optimizer

    def _phi_timesteps(self, batch: int, ctx: StepContext, draw: str) -> list[float]:
        """Uniform draws from all timesteps; images that the prior denoises jointly share one."""
        views = self.prior.views
        drawn = uniform_draws(ctx.rng, f"{draw}/t", ctx.step, batch, views)
        # Shift by half a timestep, so that rounding yields the first and the last timestep as often as the others.
        half = 0.5 / self.schedule.num_train_timesteps
        begins_at_zero = float(self.schedule.quantize(drawn.new_zeros(1))) == 0.0
        return per_image(self.schedule.quantize(drawn - half if begins_at_zero else drawn + half), batch, views)

    def _with_dropped_cameras(self, conditioning: Conditioning, ctx: StepContext, draw: str) -> Conditioning:
        """Replace the cameras of some items by zeros, so that phi also learns the score without a camera."""
        assert conditioning.camera is not None
        generators = [ctx.rng(f"{draw}/camera/{item}", ctx.step) for item in range(len(conditioning))]
        kept = torch.stack([torch.rand((), generator=g) >= self.config.phi.camera_dropout for g in generators])
        return replace(conditioning, camera=conditioning.camera * kept.to(conditioning.camera)[:, None])

    def _remember(self, z: Tensor, conditioning: Conditioning) -> None:
        """Append the latents and their cameras to the replay buffer, and drop the oldest entries."""
        assert conditioning.camera is not None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise FieldError("not supported with several devices; set it to 0", "phi.replay")
        new = {"latents": z, "cameras": conditioning.camera}
        kept = -(-self.config.phi.replay // self.prior.views) * self.prior.views
        old = {name: self._replay.get(name, values[:0]).to(values) for name, values in new.items()}
        self._replay = {name: torch.cat([old[name], values])[-kept:] for name, values in new.items()}

    def _recall(
        self, z: Tensor, conditioning: Conditioning, ctx: StepContext, index: int
    ) -> tuple[Tensor, Conditioning]:
        """A batch of latents drawn from the replay buffer; images that the prior denoises jointly stay together."""
        views, generator = self.prior.views, ctx.rng(f"phi/{index}/replay", ctx.step)
        groups = torch.randint(len(self._replay["latents"]) // views, (len(z) // views,), generator=generator)
        items = (groups[:, None] * views + torch.arange(views)).flatten().to(z.device)
        return self._replay["latents"][items], replace(conditioning, camera=self._replay["cameras"][items])
