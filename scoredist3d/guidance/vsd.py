"""Variational score distillation, and what its relatives share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from scoredist3d.config import FieldError, Schedule, option
from scoredist3d.guidance.core.base import NFE, Guidance, Score, StepContext
from scoredist3d.guidance.core.context import timestep_tensor
from scoredist3d.guidance.core.score_models import (
    ScoreModelConfig,
    build_score_model,
    matching_output,
    phi_conditioning,
)
from scoredist3d.priors.base import CFGConditions, Conditioning, Prediction, Prior
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


class VariationalGuidance(Guidance):
    """G = w(t) (eps_hat(x_t, t, y) - eps_phi(x_t, t, c, y)), with phi trained on the renders beside the particles.

    Each step moves the particles with phi as it is, then trains phi by denoising the same latents at timesteps drawn from
    all of the schedule, with noise of its own:

        L_phi = E_{t, eps} || eps_phi(alpha_t z + sigma_t eps, t, c, y) - eps ||^2

    in phi's own parametrisation. phi sees the prompt without view words and the camera c, and has no text guidance. All
    particles share it. Its weights and its optimiser's state are in the ``state_dict``.

    Attributes:
        phi: The network, see :mod:`scoredist3d.guidance.core.score_models`. One without parameters is not trained.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of methods with a phi."""

        phi: ScoreModelConfig = field(
            default_factory=ScoreModelConfig, metadata={"help": "The network that learns the renders."}
        )

    config: Config
    phi: Any

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        super().__init__(config, prior=prior, rng=rng)
        self.phi = build_score_model(config.phi, prior, self.rng)
        self._optimizer: torch.optim.AdamW | None = None
        self._optimizer_state: dict[str, Any] = {}
        self._replay: dict[str, Tensor] = {}

    @abstractmethod
    def camera_scale(self, step: int) -> float:
        """gamma_phi of eps_phi(no camera) + gamma_phi (eps_phi(camera) - eps_phi(no camera))."""

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """w(t) (eps_hat - eps_phi) at the same x_t."""
        x_t, _ = self.noised(z, ctx)
        phi = self.phi_prediction(x_t, ctx, conditions)
        return Score(self.weighted(self.guided(x_t, conditions, ctx), phi.x0, phi.eps))

    def phi_prediction(self, x_t: Tensor, ctx: StepContext, conditions: CFGConditions) -> Prediction:
        """phi's prediction under the configured camera scale."""
        told = phi_conditioning(conditions, len(x_t))
        scale = self.camera_scale(ctx.step)
        if scale == 1.0:
            return self._phi(x_t, ctx.t, told)
        if scale == 0.0:
            return self._phi(x_t, ctx.t, told.without_camera())
        both = self._phi(x_t.repeat(2, 1, 1, 1), ctx.t.repeat(2), Conditioning.cat([told, told.without_camera()]))
        aware, blind = both.output.chunk(2)
        return Prediction(blind + scale * (aware - blind), both.kind, x_t, ctx.t, both.schedule)

    def update(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> dict[str, Tensor]:
        """Train phi on the latents; its mean loss."""
        if not self.phi_nfe():
            return {}
        told = phi_conditioning(conditions, len(z))
        if self.config.phi.replay:
            self._remember(z, told)
        losses = [self._train_phi(z, told, conditions, ctx, index) for index in range(self.config.phi.steps)]
        return {"phi_loss": torch.stack(losses).mean()}

    def phi_loss(self, prediction: Prediction, z: Tensor, eps: Tensor, conditions: CFGConditions, step: int) -> Tensor:
        """Squared error of phi at x_t = alpha z + sigma eps, the mean over all elements.

        Args:
            prediction: Of phi, attached to the graph; (B', C, h, w), every item of the batch ``phi.repeats`` times.
            z, eps: What x_t is made of.
            conditions: Of B items or one.
            step: Optimiser step.
        """
        return (prediction.output - matching_output(prediction, z, eps)).square().mean()

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """The guided prediction; phi once or twice, and its training."""
        looks = 1 if self.camera_scale(ctx.step) in (0.0, 1.0) else 2
        return NFE(super().nfe(conditions, ctx).prior, looks + self.phi_nfe())

    def phi_nfe(self) -> int:
        """Rows of phi that a step trains on, per image."""
        phi = self.config.phi
        return phi.steps * phi.repeats if any(p.requires_grad for p in self.phi.parameters()) else 0

    def get_extra_state(self) -> dict[str, Any]:
        """State of phi's optimiser, and the latents it may train on again."""
        state = self._optimizer_state if self._optimizer is None else self._optimizer.state_dict()
        return {"optimizer": state, "replay": self._replay}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`get_extra_state`."""
        self._optimizer, self._optimizer_state = None, copy.deepcopy(state["optimizer"])
        self._replay = dict(state["replay"])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """The optimiser's state follows the parameters: it is built again at the next step."""
        self._optimizer_state, self._optimizer = self.get_extra_state()["optimizer"], None
        return super()._apply(fn, recurse)

    def _phi(self, x_t: Tensor, t: Tensor, told: Conditioning) -> Prediction:
        prediction: Prediction = self.phi.predict(x_t, t, told)
        return prediction

    def _train_phi(
        self, z: Tensor, told: Conditioning, conditions: CFGConditions, ctx: StepContext, index: int
    ) -> Tensor:
        """One optimiser step of phi; its loss."""
        if self.config.phi.replay:
            z, told = self._recall(z, told, ctx, index)
        draws = [f"phi/{index}/{repeat}" for repeat in range(self.config.phi.repeats)]
        t = timestep_tensor([timestep for draw in draws for timestep in self._phi_timesteps(len(z), ctx, draw)], z)
        eps = torch.cat([ctx.noise(z, f"{draw}/noise") for draw in draws])
        seen = Conditioning.cat([self._with_dropped_cameras(told, ctx, draw) for draw in draws])
        clean = z.repeat(len(draws), 1, 1, 1)
        with torch.enable_grad():
            prediction = self._phi(self.schedule.add_noise(clean, eps, t), t, seen)
            loss = self.phi_loss(prediction, clean, eps, conditions, ctx.step)
        self._descend(loss, clean.numel(), ctx.step)
        return loss.detach()

    def _descend(self, loss: Tensor, elements: int, step: int) -> None:
        """One AdamW step; the gradient is the mean over all ranks."""
        optimizer = self._built_optimizer()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        # In a half-precision network the gradient of a mean over many elements underflows; that of the sum does not.
        (loss * elements).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        average_over_ranks(gradients)
        torch._foreach_div_(gradients, float(elements))
        self._check(step, "the gradient of phi", torch.stack(torch._foreach_norm(gradients)))
        for group in optimizer.param_groups:
            group["lr"] = self.config.phi.lr(step)
        optimizer.step()

    def _built_optimizer(self) -> torch.optim.AdamW:
        """Built at the first use, when the parameters are where they will stay."""
        if self._optimizer is None:
            trained = [p for p in self.phi.parameters() if p.requires_grad]
            self._optimizer = torch.optim.AdamW(trained, weight_decay=self.config.phi.weight_decay)
            if self._optimizer_state:
                self._optimizer.load_state_dict(self._optimizer_state)
        return self._optimizer

    def _phi_timesteps(self, batch: int, ctx: StepContext, draw: str) -> list[float]:
        """Uniform draws from all timesteps; images that the prior sees jointly share one."""
        groups = range(-(-batch // self.prior.views))
        drawn = torch.stack(
            [torch.rand((), generator=ctx.rng(f"{draw}/t/{group}", ctx.step), dtype=torch.float64) for group in groups]
        )
        # Half a timestep towards where the timesteps begin, so that rounding gives the outermost as often as those between.
        half = 0.5 / self.schedule.num_train_timesteps
        begins_at_zero = float(self.schedule.quantize(drawn.new_zeros(1))) == 0.0
        timesteps: list[float] = self.schedule.quantize(drawn - half if begins_at_zero else drawn + half).tolist()
        return [timestep for timestep in timesteps for _ in range(self.prior.views)][:batch]

    def _with_dropped_cameras(self, told: Conditioning, ctx: StepContext, draw: str) -> Conditioning:
        """Zeros in place of some items' cameras, so that phi also learns the renders from anywhere."""
        assert told.camera is not None
        generators = [ctx.rng(f"{draw}/camera/{item}", ctx.step) for item in range(len(told))]
        kept = torch.stack([torch.rand((), generator=g) >= self.config.phi.camera_dropout for g in generators])
        return replace(told, camera=told.camera * kept.to(told.camera)[:, None])

    def _remember(self, z: Tensor, told: Conditioning) -> None:
        assert told.camera is not None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise FieldError("works on one device only; set it to 0", "phi.replay")
        new = {"latents": z, "cameras": told.camera}
        kept = -(-self.config.phi.replay // self.prior.views) * self.prior.views
        old = {name: self._replay.get(name, values[:0]).to(values) for name, values in new.items()}
        self._replay = {name: torch.cat([old[name], values])[-kept:] for name, values in new.items()}

    def _recall(self, z: Tensor, told: Conditioning, ctx: StepContext, index: int) -> tuple[Tensor, Conditioning]:
        """As many latents as the batch has, drawn from those remembered; jointly seen ones together."""
        views, generator = self.prior.views, ctx.rng(f"phi/{index}/replay", ctx.step)
        groups = torch.randint(len(self._replay["latents"]) // views, (len(z) // views,), generator=generator)
        items = (groups[:, None] * views + torch.arange(views)).flatten().to(z.device)
        return self._replay["latents"][items], replace(told, camera=self._replay["cameras"][items])


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the ranks of a distributed run, in one exchange."""
    if not (distributed.is_available() and distributed.is_initialized()) or not tensors:
        return
    flat = nn.utils.parameters_to_vector(tensors)
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / distributed.get_world_size(), tensors)


@register(
    "guidance",
    "vsd",
    summary="Follow the prior's score minus that of the renders, which a second network learns.",
    arxiv="2305.16213",
)
class VariationalScoreDistillation(VariationalGuidance):
    """G = w(t) (eps_hat(x_t, t, y) - eps_phi(x_t, t, c, y)) (ProlificDreamer, eq. 9).

    The gradient flow of the KL divergence, at every timestep, between the distribution of the renders of all
    particles and the prior's. With phi at the score of a single point it is SDS; with an exact phi the particles keep
    the prior's spread, which is why ordinary guidance scales do. The paper anneals the timesteps in two phases:
    ``t_max: {from: 0.98, to: 0.5, end: 5000, shape: step}``.
    """

    @dataclass
    class Config(VariationalGuidance.Config):
        """Options of VSD."""

        gamma_phi: Schedule = option(
            1.0, "phi's camera scale, phi(none) + gamma_phi (phi(c) - phi(none)); 1 and 0 take one call each."
        )

    config: Config

    def camera_scale(self, step: int) -> float:
        """As configured."""
        return self.config.gamma_phi(step)
