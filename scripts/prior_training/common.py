"""Shared parts of the training stages: weight averaging, learning-rate schedule, resumable state, logging."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scoredist3d.files import atomic_path

_UNTIMED_STEPS = 20


class Ema:
    """Exponential moving average of a module's parameters, with a lower decay in the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module: Any = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Include the current parameters of ``module`` in the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averaged: list[Tensor] = [p.detach() for p in self.module.parameters()]
        current: list[Tensor] = [p.detach() for p in module.parameters()]
        torch._foreach_mul_(averaged, decay)
        torch._foreach_add_(averaged, current, alpha=1 - decay)


def learning_rate(step: int, total: int, peak: float, *, warmup: int = 200, hold: float = 0.5) -> float:
    """Learning rate: linear warm-up, constant until the fraction ``hold`` of the run, then cosine decay to 1 %."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = max(0.0, (step / max(total, 1) - hold) / max(1 - hold, 1e-9))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The last training state of a stage, or None if it has not started."""
    return torch.load(path, map_location=device, weights_only=True) if path.is_file() else None


def load_exported(module: nn.Module, folder: Path) -> None:
    """Load the weights of a network that was exported to ``folder``, in fp32."""
    (file,) = folder.glob("*.safetensors")
    module.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})


def build_optimizer(module: nn.Module, lr: float, *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for the parameters of a module, which is on its device."""
    fused = next(module.parameters()).is_cuda
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)


@dataclass
class Stage:
    """State, learning rate and logging of a resumable training loop.

    Attributes:
        name: Stem of the state file and first word of the log lines.
        modules: Trained modules by name.
        optimizer: Optimizer of the modules.
        emas: Weight averages by name; they are saved with the state.
        total: Number of steps.
        work: Folder of the state files.
        peak_lr: Highest learning rate.
        generator: Source of batches, noise and timesteps; its state is saved, so that a resumed stage continues with
            the same numbers.
        warmup: Steps of the linear warm-up.
        hold: Fraction of the steps after which the learning rate decays; 1 for a constant one.
        minutes: If positive, the number of steps is adapted every 100 steps so that the stage takes this time.
        save_every_s: Seconds between two saved states.
        step: Number of finished steps.
    """

    name: str
    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    emas: dict[str, Ema]
    total: int
    work: Path
    peak_lr: float
    generator: torch.Generator
    warmup: int = 200
    hold: float = 0.5
    minutes: float = 0.0
    save_every_s: float = 60.0
    step: int = 0
    _timed_since: float = 0.0
    _saved_at: float = 0.0
    _logged: tuple[int, float] = (0, 0.0)

    def resume(self, device: torch.device) -> None:
        """Load the last saved state, if there is one."""
        state = load_state(self.work / f"{self.name}.pt", device)
        if state is not None:
            for key, module in self.modules.items():
                module.load_state_dict(state["modules"][key])
            for key, ema in self.emas.items():
                ema.module.load_state_dict(state["emas"][key])
                ema.steps = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.total = state["step"], state["total"]
            self.generator.set_state(state["generator"].cpu())
        self._saved_at = time.monotonic()
        self._logged = (self.step, time.monotonic())

    def save(self) -> None:
        """Save the state."""
        save_state(
            self.work / f"{self.name}.pt",
            {
                "modules": {key: module.state_dict() for key, module in self.modules.items()},
                "emas": {key: ema.module.state_dict() for key, ema in self.emas.items()},
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
                "total": self.total,
            },
        )
        self._saved_at = time.monotonic()

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [p for module in self.modules.values() for p in module.parameters()]

    def descend(self, loss: Tensor, *, batch: int, log_every: int) -> None:
        """One optimizer step with the gradients of ``loss``, their norm clipped to 1; see :meth:`advance`."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        for name, ema in self.emas.items():
            ema.update(self.modules[name])
        self.advance(loss, batch=batch, log_every=log_every)

    def advance(self, loss: Tensor, *, batch: int, log_every: int) -> None:
        """Count a finished step; save the state and log when due.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        self.step += 1
        if self.minutes and self.step % 100 == _UNTIMED_STEPS:
            float(loss)  # synchronizes
            self._fit()
        if self.step % log_every == 0 or self.step == self.total:
            value = float(loss)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{self.name}: the loss is {value} at step {self.step}; lower the learning rate"
                )
            last_step, last_time = self._logged
            rate = (self.step - last_step) * batch / max(time.monotonic() - last_time, 1e-9)
            print(f"{self.name} {self.step}/{self.total} loss {value:.4f} {rate:,.0f} samples/s", flush=True)
            self._logged = (self.step, time.monotonic())
        if self.step == self.total or time.monotonic() - self._saved_at > self.save_every_s:
            self.save()

    def _fit(self) -> None:
        """Set the number of steps to what fits into ``minutes``; the stage of a resumed training keeps its number.

        The first steps include the compilation and are not timed.
        """
        if self.step == _UNTIMED_STEPS:
            self._timed_since = time.monotonic()
        elif self._timed_since:
            seconds = time.monotonic() - self._timed_since
            rate = (self.step - _UNTIMED_STEPS) / seconds
            self.total = max(self.step + 1, round(self.step + (60.0 * self.minutes - seconds) * rate))

    def refill_is_due(self, refreshes: int) -> bool:
        """Whether to replace the training data before the next step; ``refreshes`` times, at equal distances."""
        period = self.total // (refreshes + 1)
        return refreshes > 0 and self.step > 0 and self.step % period == 0 and self.total - self.step >= period

    def set_lr(self) -> None:
        """Set the learning rate of the optimizer for the current step."""
        lr = learning_rate(self.step, self.total, self.peak_lr, warmup=self.warmup, hold=self.hold)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
