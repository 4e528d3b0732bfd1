"""Stopping at the first non-finite value, without making the accelerator wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class NonFiniteError(ArithmeticError):
    """A NaN or infinity; the message names the step and the term."""


@dataclass
class _Pending:
    step: int
    term: str
    finite: Tensor
    ready: torch.cuda.Event


class FiniteCheck:
    """Raises for a tensor that holds NaN or infinity.

    On the CPU the check is immediate. On CUDA the answer travels to the host in the background and is read at the next
    :meth:`collect`, one step later, by when it has arrived: reading it at once would stall the device at every step.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def __call__(self, step: int, term: str, tensor: Tensor) -> None:
        """Check one tensor.

        Raises:
            NonFiniteError: The tensor is on the CPU and not finite.
        """
        finite = torch.isfinite(tensor).all()
        if tensor.device.type != "cuda":
            _require(step, term, bool(finite))
            return
        answer = finite.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(tensor.device))
        self._pending.append(_Pending(step, term, answer, ready))

    def collect(self) -> None:
        """Read the answers still on their way.

        Raises:
            NonFiniteError: The first of them that is negative.
        """
        pending, self._pending = self._pending, []
        for item in pending:
            item.ready.synchronize()
            _require(item.step, item.term, bool(item.finite))


def _require(step: int, term: str, finite: bool) -> None:
    if not finite:
        raise NonFiniteError(
            f"step {step}: {term} holds NaN or infinity. Usual reasons: the learning rate is too high, 16-bit "
            "precision overflows (prior.precision=fp32), or t_max reaches a timestep without signal."
        )
