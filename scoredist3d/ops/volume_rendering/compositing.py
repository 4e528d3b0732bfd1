"""Emission-absorption compositing of packed intervals (Max 1995; Mildenhall et al. 2020, equation 3).

With density sigma_i constant on an interval of length dt_i, ``alpha_i = 1 - exp(-sigma_i dt_i)``, transmittance
``T_i = exp(-sum_{j<i} sigma_j dt_j)`` over the earlier intervals of the same ray, and weight ``w_i = T_i alpha_i``.
This integrates a piecewise constant medium exactly, and the weights of a ray sum to its opacity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops import backends, native
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples

BACKENDS = ("torch", "native", "triton", "nerfacc")

# exp(-80) = 2e-35 is negligible, so a larger optical depth of an interval does not change any weight. The limit keeps
# the cumulative sum over all rays accurate for any density.
_MAX_OPTICAL_DEPTH = 80.0


def render_weights(densities: Tensor, samples: RaySamples, *, backend: str = "auto") -> Tensor:
    """Compositing weights of intervals, ``w_i = T_i (1 - exp(-sigma_i dt_i))``.

    Args:
        densities: (M,), non-negative, inverse scene units.
        samples: The intervals.
        backend: auto, torch, native (CPU), triton or nerfacc (CUDA).

    Returns:
        (M,) in [0, 1], differentiable in the densities (torch: any order, other backends: once).

    Raises:
        ValueError: A shape is wrong or the backend is not usable.
    """
    _check_length("densities", densities, samples)
    densities = densities.to(samples.t_starts.dtype)
    name = backends.choose("compositing", backend, densities.device, BACKENDS, densities.dtype)
    if name == "torch":
        depth, before = _optical_depths(densities, samples)
        return torch.exp(-before) * -torch.expm1(-depth)
    if name == "nerfacc":
        import nerfacc

        packed = torch.stack((samples.offsets[:-1], samples.offsets.diff()), dim=1)
        return nerfacc.render_weight_from_density(samples.t_starts, samples.t_ends, densities, packed_info=packed)[0]
    return _Weights.apply(densities, samples, name)


def transmittance(densities: Tensor, samples: RaySamples) -> Tensor:
    """Transmittance T_i (M,) at the start of each interval, in plain torch."""
    _check_length("densities", densities, samples)
    return torch.exp(-_optical_depths(densities.to(samples.t_starts.dtype), samples)[1])


def accumulate(weights: Tensor, values: Tensor | None, samples: RaySamples, *, backend: str = "auto") -> Tensor:
    """Sums of ``weights * values`` over each ray; deterministic except with ``nerfacc``.

    Args:
        weights: (M,).
        values: (M, C), or None for the sum of the weights (opacity).
        samples: The intervals.
        backend: auto, torch, native (CPU), triton or nerfacc (CUDA).

    Returns:
        (R, C), or (R, 1) without values; 0 for rays without intervals. Differentiable in weights and values (torch: any
        order, other backends: once).

    Raises:
        ValueError: A shape is wrong or the backend is not usable.
    """
    _check_length("weights", weights, samples)
    if values is not None:
        if values.ndim != 2 or values.shape[0] != len(samples):
            raise ValueError(f"compositing: values must be ({len(samples)}, C), got {tuple(values.shape)}")
        values = values.to(weights.dtype)
    name = backends.choose("compositing", backend, weights.device, BACKENDS, weights.dtype)
    if name == "torch":
        terms = weights[:, None] if values is None else weights[:, None] * values
        return _SegmentSum.apply(terms, samples.ray_indices, samples.offsets)
    if name == "nerfacc":
        import nerfacc

        return nerfacc.accumulate_along_rays(weights, values, samples.ray_indices, samples.num_rays)
    return _Accumulate.apply(weights, values, samples, name)


def _check_length(name: str, tensor: Tensor, samples: RaySamples) -> None:
    if tensor.shape != samples.ray_indices.shape:
        raise ValueError(f"compositing: {name} must be ({len(samples)},), got {tuple(tensor.shape)}")


def _optical_depths(densities: Tensor, samples: RaySamples) -> tuple[Tensor, Tensor]:
    """Optical depth (M,) of each interval, and the total optical depth (M,) of the earlier intervals of its ray."""
    lengths = samples.lengths
    depth = (densities * lengths).clamp(max=_MAX_OPTICAL_DEPTH)
    # Cumulative sum over all rays, minus its value at the start of the ray. It reaches about 1e5 for an image, where
    # float32 has only two decimal places.
    total = torch.nn.functional.pad(depth.double().cumsum(0), (1, 0))
    before = total[:-1] - total[samples.offsets[:-1]][samples.ray_indices]
    return depth, before.to(depth.dtype)


class _SegmentSum(torch.autograd.Function):
    """Sums (R, C) over each ray of terms (M, C); deterministic on every device, unlike ``index_add`` on CUDA."""

    @staticmethod
    def forward(ctx: Any, terms: Tensor, ray_indices: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(ray_indices)
        # unsafe skips a check of the offsets that would synchronize with the device.
        return torch.segment_reduce(terms.contiguous(), "sum", offsets=offsets, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ray_indices,) = ctx.saved_tensors
        return grad.index_select(0, ray_indices), None, None


class _Weights(torch.autograd.Function):
    """``render_weights`` by a C or Triton kernel, with its analytic gradient."""

    @staticmethod
    def forward(ctx: Any, densities: Tensor, samples: RaySamples, backend: str) -> Tensor:
        densities = densities.contiguous()
        intervals = (samples.t_starts, samples.t_ends, samples.offsets)
        ctx.backend, ctx.num_rays = backend, samples.num_rays
        if backend == "triton":
            from scoredist3d.ops.volume_rendering import triton_backend

            weights = triton_backend.weights(densities, *intervals, _MAX_OPTICAL_DEPTH)
            ctx.save_for_backward(weights, densities, *intervals)
            return weights
        weights, after = torch.empty_like(densities), torch.empty_like(densities)
        arguments = (densities, *intervals, _MAX_OPTICAL_DEPTH, weights, after, samples.num_rays)
        native.call("sd3d_render_weights", *arguments)
        ctx.save_for_backward(weights, after, densities, *intervals)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous()
        if ctx.backend == "triton":
            from scoredist3d.ops.volume_rendering import triton_backend

            weights, densities, *intervals = ctx.saved_tensors
            arguments = (grad, weights, densities, *intervals, _MAX_OPTICAL_DEPTH)
            return triton_backend.weights_gradient(*arguments), None, None
        out = torch.empty_like(grad)
        native.call("sd3d_render_weights_gradient", grad, *ctx.saved_tensors, _MAX_OPTICAL_DEPTH, out, ctx.num_rays)
        return out, None, None


class _Accumulate(torch.autograd.Function):
    """``accumulate`` by a C or Triton kernel, with its gradients."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor | None, samples: RaySamples, backend: str) -> Tensor:
        weights = weights.contiguous()
        values = None if values is None else values.contiguous()
        ctx.save_for_backward(weights, values, samples.offsets, samples.ray_indices)
        ctx.backend = backend
        if backend == "triton":
            from scoredist3d.ops.volume_rendering import triton_backend

            return triton_backend.accumulate(weights, values, samples.offsets)
        channels = 1 if values is None else values.shape[1]
        out = weights.new_empty(samples.num_rays, channels)
        native.call("sd3d_accumulate", weights, values, samples.offsets, out, channels, samples.num_rays)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weights, values, offsets, ray_indices = ctx.saved_tensors
        wants_weights, wants_values = ctx.needs_input_grad[:2]
        if ctx.backend == "triton":
            gathered = grad.index_select(0, ray_indices)
            by_weights = gathered if values is None else gathered * values
            of_values = weights[:, None] * gathered if wants_values else None
            return by_weights.sum(1) if wants_weights else None, of_values, None, None
        of_weights = torch.empty_like(weights) if wants_weights else None
        of_values = torch.empty_like(values) if wants_values else None
        outputs = (of_weights, of_values, grad.shape[1], grad.shape[0])
        native.call("sd3d_accumulate_gradient", grad.contiguous(), weights, values, offsets, *outputs)
        return of_weights, of_values, None, None
