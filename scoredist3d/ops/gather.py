"""Weighted sums of table rows, the common core of attribute interpolation and texture sampling.

``blend_rows`` computes ``out_n = sum_k weights_nk table[index_nk]``. The torch backend materializes the rows (N, K, C).
The native backend (``native/raster.c``) does not, and sums the gradient of the table without atomics, independently of
the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops import backends, native

BACKENDS = ("torch", "native")


def blend_rows(table: Tensor, index: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Weighted sums of table rows, differentiable in table and weights (torch: any order, native: once).

    Args:
        table: (R, C).
        index: (N, K) int64, rows in [0, R); not checked.
        weights: (N, K), cast to the dtype of the table.
        backend: auto, torch or native (CPU).

    Returns:
        (N, C).
    """
    if backends.choose("row blending", backend, table.device, BACKENDS, table.dtype) == "native":
        return _Blend.apply(table, index.contiguous(), weights.to(table.dtype))
    return (gather_rows(table, index, backend="torch") * weights[..., None]).sum(dim=1)


def gather_rows(table: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """Gather ``table[index]`` (..., C) from table (R, C) and index (...) int64; differentiable to any order."""
    if backends.choose("row gathering", backend, table.device, BACKENDS, table.dtype) == "native":
        return _Gather.apply(table, index.contiguous())
    return table.index_select(0, index.reshape(-1)).reshape(*index.shape, table.shape[1])


class _Gather(torch.autograd.Function):
    """Gather of rows; its gradient is :class:`_Scatter`, whose gradient is a gather again."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return table.index_select(0, index.reshape(-1)).reshape(*index.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _Scatter.apply(grad.reshape(-1, grad.shape[-1]), index.reshape(-1, 1), ctx.rows), None


class _Scatter(torch.autograd.Function):
    """Scatter-add of rows, the gradient of :class:`_Gather`: adds rows (N, C) to a zero table at ``index`` (N, 1)."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return _scatter(index, None, grad, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _Gather.apply(grad, index)[:, 0], None, None


class _Blend(torch.autograd.Function):
    """``blend_rows`` in C."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        table, weights = table.contiguous(), weights.contiguous()
        ctx.save_for_backward(table, index, weights)
        out = table.new_empty(index.shape[0], table.shape[1])
        native.call("sd3d_rows_blend", table, index, weights, out, *index.shape, table.shape[1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, index, weights = ctx.saved_tensors
        grad = grad.contiguous()
        of_weights = None
        if ctx.needs_input_grad[2]:
            of_weights = torch.empty_like(weights)
            native.call("sd3d_rows_weight_gradient", table, index, grad, of_weights, *index.shape, table.shape[1])
        of_table = _scatter(index, weights, grad, table.shape[0]) if ctx.needs_input_grad[0] else None
        return of_table, None, of_weights


def _scatter(index: Tensor, weights: Tensor | None, grad: Tensor, rows: int) -> Tensor:
    """Zero table (rows, C) to which ``weights`` (default 1) times ``grad`` is added in the rows ``index``."""
    out = grad.new_zeros(rows, grad.shape[-1])
    native.call("sd3d_rows_scatter", index, weights, grad.contiguous(), out, rows, *index.shape, grad.shape[-1])
    return out
