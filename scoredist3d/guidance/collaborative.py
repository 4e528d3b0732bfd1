"""Collaborative score distillation, with the images of a batch as particles of Stein variational gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import Schedule, option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import Score
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "collaborative-sd",
    summary="Share SDS directions between similar images of a batch using Stein variational gradient descent.",
    arxiv="2307.04787",
    aliases=("collaborative-csd",),
)
class CollaborativeScoreDistillation(Guidance):
    """Collaborative score distillation for the N items of a batch, which share a timestep:

        G_i = w(t) / N (sum_j k(x_j, x_i) (eps_hat(x_j; t, y_j) - eps_j) + s R_i).

    The kernel is k(a, b) = exp(-||a - b||^2 / h) on the noisy latents, with h = median / log(N + 1) over the squared
    distances of distinct items. (The authors' code includes the zeros of the diagonal, which makes h zero for two
    items.) The repulsion is

        R_i = sum_j grad_{x_i} k(x_i, x_j) = -(2 / h) sum_j k_ij (x_i - x_j).

    Its sign is that of the authors' code, with which descent repels; the sign printed in eq. 8 attracts. One item gives
    SDS, and N items divide its step by N.

    With independent noise the distances are dominated by the noise, and k is near 1 / (N + 1) for all pairs,
    regardless of the images; ``noise_sharing: shared`` or ``kernel_space: z`` makes it depend on the images.
    Subtracting eps_j with a kernel that depends on it adds sigma R_i on average, by Stein's identity, in addition to
    ``repulsion_scale``. Editing with an image-conditioned model (CSD-Edit), windows of a panorama and the LPIPS kernel
    are not implemented.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of collaborative score distillation."""

        guidance_scale: Schedule = option(
            20.0,
            "Guidance scale gamma in eps_u + gamma (eps_c - eps_u); the paper uses 20 for text-to-3D with a "
            "pixel-space model.",
        )
        repulsion_scale: Literal[0, 1, "sigma"] = option(
            1,
            "Repulsion scale s. 1: the paper; 0: no repulsion; sigma: exact SVGD (sigma / alpha for kernel_space=z).",
        )
        kernel_space: Literal["xt", "z"] = option(
            "xt", "Latents that the kernel compares. xt: noisy latents, as in the paper; z: clean latents."
        )
        noise_sharing: Literal["independent", "shared"] = option(
            "independent",
            "Noise of the items. independent: one sample per item (the authors' code); shared: one sample for all.",
        )
        bandwidth: float | None = option(None, "Bandwidth h of the kernel; null uses the median rule.", gt=0)

    config: Config

    def sample_timesteps(self, batch: int, step: int, rng: Rng) -> list[float]:
        """One timestep for the whole batch, because the kernel compares its items."""
        return super().sample_timesteps(1, step, rng) * batch

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Kernel-weighted average of the items' SDS directions, plus the repulsion."""
        x_t, eps = self.noised(z, ctx)
        direction = self.weighted(self.guided(x_t, conditions, ctx), z, eps)
        if len(z) == 1:
            return Score(direction)
        points = x_t if self.config.kernel_space == "xt" else z
        with torch.autocast(z.device.type, enabled=False):
            kernel, repulsion, h = stein_kernel(points, self.config.bandwidth)
            gradient = (kernel @ direction.flatten(1).to(kernel.dtype)).to(z.dtype).view_as(z)
        if self.config.repulsion_scale != 0:
            gradient = gradient + per_item(self._repulsion_weight(ctx.t), z) * repulsion.to(z.dtype)
        off_diagonal = (kernel.sum() - len(z)) / (len(z) * (len(z) - 1))
        return Score(gradient / len(z), diagnostics={"kernel": off_diagonal, "bandwidth": h})

    def noised(self, z: Tensor, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Noisy latents x_t and their noise eps, which is independent for each item or shared."""
        if self.config.noise_sharing == "independent":
            return super().noised(z, ctx)
        eps = ctx.noise(z[:1]).expand_as(z)
        return self.schedule.add_noise(z, eps, ctx.t), eps

    def _repulsion_weight(self, t: Tensor) -> Tensor:
        """Weight w(t) s (B,) of the repulsion."""
        weight = self.time_weight(t)
        if self.config.repulsion_scale != "sigma":
            return weight
        alpha, sigma = self.schedule.coefficients(t)
        return weight * (sigma if self.config.kernel_space == "xt" else sigma / alpha)


def stein_kernel(points: Tensor, bandwidth: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Radial kernel of N >= 2 points, and the sums of its gradients.

    Args:
        points: (N, ...), compared in fp32 or better.
        bandwidth: h; None uses the median squared distance of distinct points divided by log(N + 1), with which points
            at equal distances have k = 1 / (N + 1).

    Returns:
        k (N, N); R with R_i = sum_j grad_{x_i} k(x_i, x_j), in the shape of ``points``; and the scalar h. Coincident
        points have k = 1 and do not repel each other.
    """
    count = len(points)
    flat = points.flatten(1)
    flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    squared = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    if bandwidth is None:
        rows, columns = torch.triu_indices(count, count, offset=1, device=flat.device)
        h = squared[rows, columns].median() / math.log(count + 1)
        h = h.clamp_min(4.0 * torch.finfo(flat.dtype).tiny)
    else:
        h = flat.new_tensor(bandwidth)
    kernel = torch.exp(-squared / h)
    # Differences are computed first: with a tiny h, coincident points must contribute an exact zero.
    away = torch.stack([row @ (point - flat) for row, point in zip(kernel, flat, strict=True)])
    return kernel, (-2.0 / h * away).view(points.shape), h
