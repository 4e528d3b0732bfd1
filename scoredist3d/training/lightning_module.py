"""Lightning module around a system: automatic optimization, learning rates and checks for NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from scoredist3d.config.experiment import TrainerConfig
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.reasons import part
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System
from scoredist3d.training.checkpoint import load_weights
from scoredist3d.training.metrics import MAX_PENDING, MetricBuffer
from scoredist3d.training.optimizer import build_optimizer, set_learning_rates


class EndlessSteps:
    """Endless data loader that yields batch numbers instead of data; the run ends at ``trainer.max_steps``."""

    def __iter__(self) -> Iterator[int]:
        batch = 0
        while True:
            yield batch
            batch += 1


class TrainingModule(pl.LightningModule):
    """Lightning module that trains a :class:`System`; its ``state_dict`` is that of the system.

    Randomness: micro-batch ``m`` of rank ``r`` among ``R`` ranks uses the random stream of rank ``r + m R``, so
    accumulating gradients over k micro-batches gives the same result as k ranks. State shared by all ranks, such as
    the occupancy grid, uses the stream of rank 0.
    """

    def __init__(self, system: System, trainer_config: TrainerConfig, rng: Rng) -> None:
        super().__init__()
        self.system = system
        self.trainer_config = trainer_config
        self.rng = rng
        self.buffer = MetricBuffer()
        self.micro_batch = 0
        # Networks that a guidance trains itself take no part in DDP's backward pass.
        grouped = {id(p) for group in system.parameter_groups() for p in group["params"]}
        ignored = [f"system.{name}" for name, p in system.named_parameters() if id(p) not in grouped]
        if trainer_config.accumulate > 1 and any(p.requires_grad and id(p) not in grouped for p in system.parameters()):
            raise ValueError(
                "trainer.accumulate: the guidance trains its own network with one update per batch, so gradients "
                "cannot be accumulated; set trainer.accumulate=1 and increase data.batch_size, or use several devices"
            )
        self._ddp_params_and_buffers_to_ignore = ignored
        self._gradient_norms: list[tuple[int, list[str], Tensor]] = []

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The system's ``state_dict`` without a name prefix, so that evaluation can load it without Lightning."""
        return self.system.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        """Load the system's weights; missing and unexpected names are errors."""
        load_weights(self.system, dict(state_dict))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer over the system's parameter groups."""
        # A fused step unscales 16-bit gradients internally, where they can be neither checked nor clipped.
        fused = self.trainer_config.precision != "16-mixed"
        return build_optimizer(self.system.config.optimizer, self.system.parameter_groups(), fused=fused)

    def on_fit_start(self) -> None:
        """Move the prior, which is outside the module tree, to the device."""
        with part("the models on the device"):
            self.system.to_device(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set learning rates and step-dependent state before the first micro-batch of an optimizer step."""
        self.micro_batch = batch_idx % self.trainer_config.accumulate
        if self.micro_batch == 0:
            step = self.global_step
            set_learning_rates(self.trainer.optimizers[0], self.system.config.optimizer, step)
            with part("the update before a step"):
                self.system.prepare_step(step, self.rng.shared())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Run one forward pass of the system, collect the values to log, and return the loss."""
        rank = self.trainer.global_rank + self.micro_batch * self.trainer.world_size
        try:
            with part("the forward pass"):
                result = self.system.training_step(self.global_step, Rng(self.rng.seed, rank))
        except NonFiniteError:
            self.check_parameters()  # They are the cause if they are not finite, either.
            raise
        self.buffer.add(self.global_step, {"loss": result.loss.detach(), **result.scalars})
        if self.device.type == "cpu":
            # A CPU needs no transfer, so the check can stop the run before a non-finite loss reaches the weights.
            self.buffer.fetch()
        return result.loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Apply the optimizer's update and then densify, before any callback saves the state."""
        with part("the optimizer"):  # Its closure, the forward and the backward pass, has names of its own.
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with part("the densification"):
            self.system.post_backward(self.global_step, self.trainer.optimizers[0], self.rng.shared())

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients."""
        with part("the backward pass"):
            super().backward(loss, *args, **kwargs)

    def on_after_backward(self) -> None:
        """With several devices, check that every parameter has a gradient; DDP would wait forever for a missing one."""
        if self.trainer.world_size > 1 and self.system.steps_everything:
            missing = [name for name, p in self._optimized() if p.grad is None]
            if missing:
                raise ValueError(
                    f"step {self.global_step}: {', '.join(missing)} got no gradient, but training on several devices "
                    "needs a gradient for every parameter; freeze or remove that component, or use one device"
                )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that gradients are finite, on a GPU those of several steps at once, then clip them."""
        gradients = {name: p.grad for name, p in self._optimized() if p.grad is not None}
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
        total = torch.linalg.vector_norm(norms)
        self._gradient_norms.append((self.global_step, list(gradients), norms))
        if self.device.type == "cpu" or len(self._gradient_norms) >= MAX_PENDING:
            self.check_gradients()
        clip = self.trainer_config.gradient_clip_norm
        if clip is not None:
            torch._foreach_mul_(list(gradients.values()), clip / total.clamp_min(clip))
        if self._scaler() is None:
            self.buffer.add(self.global_step, {"gradient_norm": total})

    def check_finite(self) -> None:
        """Evaluate all pending checks for NaN and infinity; called before anything is logged or saved.

        Raises:
            NonFiniteError: A value is NaN or infinite; the message names the step and the loss term, gradient or
                parameter.
        """
        self.buffer.fetch()
        self.check_gradients()
        self.system.check_finite()
        self.check_parameters()

    def check_parameters(self) -> None:
        """Check all parameters of the system, with one transfer from the device.

        An update may break them even if its gradient is finite.

        Raises:
            NonFiniteError: A parameter contains NaN or infinity; the message names it.
        """
        named = {name: p.detach() for name, p in self.system.named_parameters() if p.is_floating_point() and p.numel()}
        if not named:
            return
        # The largest absolute value does not overflow, unlike a sum of squares.
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(list(named.values()), math.inf)]).tolist()
        for name, value in zip(named, largest, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(self.global_step, f"the parameter {name}")

    def check_gradients(self) -> None:
        """Check the gradient norms collected so far, with one transfer from the device.

        Raises:
            NonFiniteError: A norm is NaN or infinite; the message names the step and the parameter.
        """
        pending, self._gradient_norms = self._gradient_norms, []
        if not pending:
            return
        scaler = self._scaler()
        if scaler is not None and scaler.get_scale() >= 1.0:
            return  # The loss scaler adapts its scale to overflows, and skips the steps in which they occur.
        values = torch.cat([norms for _, _, norms in pending]).tolist()
        position = 0
        for step, names, norms in pending:
            for name, value in zip(names, values[position : position + len(norms)], strict=True):
                if not math.isfinite(value):
                    raise NonFiniteError(step, f"the gradient of {name}")
            position += len(norms)

    def _optimized(self) -> list[tuple[str, torch.nn.Parameter]]:
        ignored = set(self._ddp_params_and_buffers_to_ignore)
        return [
            (name.removeprefix("system."), p)
            for name, p in self.named_parameters()
            if p.requires_grad and name not in ignored
        ]

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)
