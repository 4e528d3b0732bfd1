"""Checks for NaN and infinity that do not stall the accelerator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config.errors import brief
from scoredist3d.reasons import ExplainedError

REMEDY = (
    "Lower the learning rate or the guidance scale, or set prior.precision=fp32 to rule out 16-bit overflow; lower "
    "guidance.t_max if the noisy input has no signal there"
)


class NonFiniteError(ExplainedError, ArithmeticError):
    """A value is NaN or infinite.

    Attributes:
        step: Optimizer step, from 0.
        term: Name of the value, such as ``loss/sparsity``.
        complete: Whether the message names the settings of the run, and not only the general remedy.
    """

    def __init__(self, step: int, term: str, remedy: str = REMEDY, where: str = "") -> None:
        """The message consists of ``where``, such as ``stage refine, ``, the step, the term and ``remedy``."""
        super().__init__(brief(f"{where}step {step}: NaN or infinity in {term}. {remedy}"))
        self.step, self.term, self.complete = step, term, remedy != REMEDY


@dataclass
class _Pending:
    """A check whose result is being copied to the host."""

    step: int
    term: str
    finite: Tensor
    ready: torch.cuda.Event


class FiniteCheck:
    """Check that raises when a tensor contains NaN or infinity.

    On the CPU the check is immediate. On CUDA the result is copied to the host in the background and read by the next
    :meth:`collect`, one step later. Reading it immediately would stall the device at every step.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def __call__(self, step: int, term: str, tensor: Tensor) -> None:
        """Check a tensor; ``term`` names it in the error message.

        Raises:
            NonFiniteError: The tensor is on the CPU and contains NaN or infinity.
        """
        finite = torch.isfinite(tensor).all()
        if tensor.device.type != "cuda":
            _require(step, term, bool(finite))
            return
        result = finite.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(tensor.device))
        self._pending.append(_Pending(step, term, result, ready))

    def collect(self) -> None:
        """Wait for all pending checks.

        Raises:
            NonFiniteError: A check has failed; the error describes the earliest one.
        """
        pending, self._pending = self._pending, []
        for item in pending:
            item.ready.synchronize()
            _require(item.step, item.term, bool(item.finite))


def _require(step: int, term: str, finite: bool) -> None:
    if not finite:
        raise NonFiniteError(step, term)
