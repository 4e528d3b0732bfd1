"""Reductions over the ranks of a distributed run; without one, the rank's own values are the result."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, distributed, nn


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace tensors with their means over the ranks of a distributed run, with one all-reduce."""
    if not _is_distributed() or not tensors:
        return
    flat = nn.utils.parameters_to_vector(tensors)
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / distributed.get_world_size(), tensors)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the ranks of a distributed run; the tensor is overwritten."""
    if _is_distributed():
        distributed.all_reduce(tensor)
    return tensor


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
