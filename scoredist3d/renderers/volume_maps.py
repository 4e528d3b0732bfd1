"""Optional maps of volume renderers: one value per ray, computed from the weights along the ray."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops.volume_rendering.compositing import accumulate
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples


def depth_variance(
    weights: Tensor, samples: RaySamples, depth: Tensor, opacity: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Depth variance (R, 1): sum_i w_i (t_i - depth)^2 / opacity; 0 for rays with opacity 0.

    Args:
        weights: (M,), weights of the samples.
        samples: M intervals along R rays.
        depth: (R, 1), weighted mean distance of the samples of each ray.
        opacity: (R, 1), sum of the weights of each ray.
        backend: Backend of the sums, see :func:`~scoredist3d.ops.volume_rendering.compositing.accumulate`.
    """
    deviation = samples.midpoints[:, None] - depth.index_select(0, samples.ray_indices)
    return accumulate(weights, deviation.square(), samples, backend=backend) / opacity.clamp_min(1e-6)


def orientation(
    weights: Tensor, samples: RaySamples, normals: Tensor, view_dirs: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Orientation penalty (R, 1): sum_i sg(w_i) max(0, n_i . v_i)^2 (Ref-NeRF, arXiv 2112.03907, equation 11).

    ``normals`` and ``view_dirs`` are (M, 3). The weights are detached, so the gradients change only the normals.
    """
    away = (normals * view_dirs).sum(-1, keepdim=True).clamp_min(0.0)
    return accumulate(weights.detach(), away.square(), samples, backend=backend)


def distortion(weights: Tensor, samples: RaySamples, diameter: float) -> Tensor:
    """Distortion (R, 1): sum_ij w_i w_j |s_i - s_j| + sum_i w_i^2 ds_i / 3 (mip-NeRF 360, equation 15).

    s is t / diameter. The distances t_i are sorted along each ray, so the double sum can be computed in linear time as
    2 sum_i w_i (t_i W_i - M_i), where W_i and M_i are the sums of w_j and w_j t_j over the samples j before i.
    """
    middle = samples.midpoints
    moments = torch.stack([weights, weights * middle], dim=1)
    # Running sum over all rays minus its value at the start of each ray, in float64 because the difference cancels.
    total = torch.nn.functional.pad(moments.double().cumsum(0), (0, 0, 1, 0))
    before = total[:-1] - total[samples.offsets[:-1]].index_select(0, samples.ray_indices)
    apart = 2.0 * weights * (middle * before[:, 0] - before[:, 1]).to(weights.dtype)
    own = weights.square() * samples.lengths / 3.0
    return accumulate(torch.ones_like(weights), ((apart + own) / diameter)[:, None], samples, backend="torch")
