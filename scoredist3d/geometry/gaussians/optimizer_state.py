"""Resizing of parameters together with their optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def resize_rows(optimizer: torch.optim.Optimizer, rows: Mapping[nn.Parameter, Tensor], keep: Tensor) -> None:
    """Keep some rows of parameters and append new ones; the moments of kept rows are kept, those of new rows are zero.

    The parameters remain the same objects, so that references in the optimizer and the module stay valid. Their
    gradients are dropped.

    Args:
        optimizer: Any optimizer whose per-parameter state has the parameter's shape (moments of Adam, momentum).
        rows: For each parameter (N, ...), the new rows (M, ...).
        keep: (N,) bool, rows to keep.
    """
    for parameter, new in rows.items():
        for state in _states(optimizer, parameter):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.cat([value[keep], value.new_zeros(new.shape)])
        replace_values(parameter, torch.cat([parameter.detach()[keep], new]))


def clear_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Set the optimizer moments of a parameter to zero."""
    for state in _states(optimizer, parameter):
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.zero_()


def replace_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Replace the values of a parameter, possibly with a different number of rows, and drop its gradient.

    The parameter remains the same object.
    """
    parameter.grad = None
    # Autograd caches the shape while an earlier graph is alive; a change of dtype invalidates the cache.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values


def _states(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[dict[str, object]]:
    """The state of the parameter in the optimizer, or in each member of a composite optimizer."""
    for member in getattr(optimizer, "optimizers", (optimizer,)):
        if parameter in member.state:
            yield member.state[parameter]
