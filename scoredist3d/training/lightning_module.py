"""A system inside Lightning: automatic optimisation, learning rates and finite checks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from scoredist3d.config.experiment import TrainerConfig
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System
from scoredist3d.systems.optimizer import build_optimizer, set_learning_rates
from scoredist3d.training.checkpoint import load_weights
from scoredist3d.training.metrics import MetricBuffer


class EndlessSteps:
    """The "data" of a run: one empty batch per optimiser step, for ever; the run ends at ``max_steps``."""

    def __iter__(self) -> Iterator[int]:
        batch = 0
        while True:
            yield batch
            batch += 1


class TrainingModule(pl.LightningModule):
    """Steps a :class:`System`; its ``state_dict`` is the system's.

    Randomness: micro-batch ``m`` of rank ``r`` among ``R`` draws as rank ``r + m R`` would, so that accumulating over k
    micro-batches is the same optimisation as k ranks. What all ranks must agree on (occupancy grid) draws as rank 0.
    """

    def __init__(self, system: System, trainer_config: TrainerConfig, rng: Rng) -> None:
        super().__init__()
        self.system = system
        self.trainer_config = trainer_config
        self.rng = rng
        self.buffer = MetricBuffer()
        self.micro_batch = 0
        # Networks of a guidance's own get their gradients outside of DDP's backward pass.
        grouped = {id(p) for group in system.parameter_groups() for p in group["params"]}
        ignored = [f"system.{name}" for name, p in system.named_parameters() if id(p) not in grouped]
        if trainer_config.accumulate > 1 and any(p.requires_grad and id(p) not in grouped for p in system.parameters()):
            raise ValueError(
                "trainer.accumulate: the guidance trains a network of its own, one step per batch, so that batches "
                "cannot be accumulated; set trainer.accumulate=1 and enlarge data.batch_size, or use several devices"
            )
        self._ddp_params_and_buffers_to_ignore = ignored
        self._gradient_norms: list[tuple[int, list[str], Tensor]] = []

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The system's own, without a prefix, so that evaluation loads it without Lightning."""
        return self.system.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        """Load the system's weights, every one of them."""
        load_weights(self.system, dict(state_dict))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser over the representation's groups."""
        # A fused step unscales 16-bit gradients inside, where they can be neither checked nor clipped.
        fused = self.trainer_config.precision != "16-mixed"
        return build_optimizer(self.system.config.optimizer, self.system.parameter_groups(), fused=fused)

    def on_fit_start(self) -> None:
        """Move what Lightning does not know about."""
        self.system.to_device(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Before the first micro-batch of an optimiser step: learning rates and step-dependent state."""
        self.micro_batch = batch_idx % self.trainer_config.accumulate
        if self.micro_batch == 0:
            step = self.global_step
            set_learning_rates(self.trainer.optimizers[0], self.system.config.optimizer, step)
            self.system.prepare_step(step, self.rng.shared())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One forward pass of the system."""
        rank = self.trainer.global_rank + self.micro_batch * self.trainer.world_size
        result = self.system.training_step(self.global_step, Rng(self.rng.seed, rank))
        self.buffer.add(self.global_step, {"loss": result.loss.detach(), **result.scalars})
        if self.device.type == "cpu":
            # No transfer to wait for: stop before a broken loss reaches the weights.
            self.buffer.fetch()
        return result.loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The update, after which elements come and go; all of it before any callback saves the state."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.system.after_step(self.global_step, self.trainer.optimizers[0], self.rng.shared())

    def on_after_backward(self) -> None:
        """A parameter without gradient leaves DDP waiting for it for ever; say which one instead."""
        if self.trainer.world_size > 1 and self.system.steps_everything:
            missing = [name for name, p in self._optimised() if p.grad is None]
            if missing:
                raise ValueError(
                    f"step {self.global_step}: {', '.join(missing)} got no gradient, which a run on several devices "
                    "needs on each of them; freeze or remove that component, or run on one device"
                )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Finite check (immediate on the CPU, at the next log line elsewhere) and gradient clipping."""
        gradients = {name: p.grad for name, p in self._optimised() if p.grad is not None}
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
        total = torch.linalg.vector_norm(norms)
        self._gradient_norms.append((self.global_step, list(gradients), norms))
        if self.device.type == "cpu":
            self.check_gradients()
        clip = self.trainer_config.gradient_clip_norm
        if clip is not None:
            torch._foreach_mul_(list(gradients.values()), clip / total.clamp_min(clip))
        if self._scaler() is None:
            self.buffer.add(self.global_step, {"gradient_norm": total})

    def check_finite(self) -> None:
        """Fetch what is pending; called before anything is logged or saved.

        Raises:
            NonFiniteError: Names step, and term or tensor.
        """
        self.buffer.fetch()
        self.check_gradients()
        self.system.check_finite()

    def check_gradients(self) -> None:
        """Look at the gradient norms collected so far (one transfer)."""
        pending, self._gradient_norms = self._gradient_norms, []
        if not pending:
            return
        scaler = self._scaler()
        if scaler is not None and scaler.get_scale() >= 1.0:
            return  # the loss scaler looks for its scale by overflowing; it skips those steps
        values = torch.cat([norms for _, _, norms in pending]).tolist()
        position = 0
        for step, names, norms in pending:
            for name, value in zip(names, values[position : position + len(norms)], strict=True):
                if not math.isfinite(value):
                    raise NonFiniteError(f"step {step}: the gradient of {name} has norm {value}")
            position += len(norms)

    def _optimised(self) -> list[tuple[str, torch.nn.Parameter]]:
        ignored = set(self._ddp_params_and_buffers_to_ignore)
        return [
            (name.removeprefix("system."), p)
            for name, p in self.named_parameters()
            if p.requires_grad and name not in ignored
        ]

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)
