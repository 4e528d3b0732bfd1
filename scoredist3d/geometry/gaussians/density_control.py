"""Adaptive density control of 3D Gaussians (Kerbl et al. 2023, arXiv 2308.04079, section 5)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from scoredist3d.config import option
from scoredist3d.geometry.base import GaussianSet, ScreenSpaceMeans
from scoredist3d.geometry.gaussians.optimizer_state import clear_moments, resize_rows
from scoredist3d.geometry.gaussians.parameters import GaussianParameters
from scoredist3d.limits import MAX_POINTS
from scoredist3d.ops.rotations import rotation_matrices
from scoredist3d.seeding import Rng


@dataclass
class DensifyConfig:
    """Schedule (in optimizer steps of the run) and thresholds of adaptive density control."""

    enabled: bool = option(True, "Add and remove Gaussians during training; not supported with several devices.")
    start: int = option(500, "Step at which densification starts.", ge=0)
    end: int = option(15000, "Step after which the number of Gaussians is fixed.", ge=0)
    every: int = option(100, "Number of steps between densifications.", ge=1)
    grad_threshold: float = option(
        2e-4,
        "Mean screen-space gradient norm from which Gaussians are densified, in normalized device coordinates.",
        ge=0,
    )
    densify_fraction: float = option(
        1.0,
        "Maximum fraction of Gaussians to densify at a time; those with the largest gradients are chosen.",
        ge=0,
        le=1,
        aliases=("grow_fraction",),
    )
    size_threshold: float = option(
        0.02,
        "Gaussians are cloned if their largest standard deviation is at most this fraction of the radius, else split.",
        ge=0,
    )
    split_factor: float = option(1.6, "Splitting divides the standard deviations by this factor.", gt=1)
    prune_opacity: float = option(0.005, "Gaussians with a lower opacity are removed.", ge=0, lt=0.5)
    prune_scale: float = option(
        0.5, "Gaussians with a standard deviation above this fraction of the radius are removed.", gt=0
    )
    opacity_reset_every: int = option(
        3000,
        "Number of steps between resets, which lower all opacities to at most twice prune_opacity; 0 disables resets.",
        ge=0,
    )
    max_points: int = option(200_000, "Maximum number of Gaussians.", ge=1, le=MAX_POINTS)

    def is_due(self, done: int) -> bool:
        """Whether to densify after ``done`` steps."""
        return self.start <= done <= self.end and done % self.every == 0

    def resets_at(self, done: int) -> bool:
        """Whether to reset opacities after ``done`` steps; not at ``end`` or later, since no pruning would follow."""
        return self.opacity_reset_every > 0 and done < self.end and done % self.opacity_reset_every == 0


class AdaptiveDensityControl:
    """Strategy that clones, splits and prunes Gaussians according to their screen-space gradients.

    The statistic of a Gaussian is the mean of |B dL/dp| over the views in which it is visible, where L is the loss of a
    step, B the number of cameras of a render, and p the projected mean in normalized device coordinates (-1 to 1 along
    each axis of the image, which makes the statistic independent of the image size). The factor B compensates for the
    mean over views in L.

    Every ``every`` steps, Gaussians whose statistic reaches ``grad_threshold`` are cloned if they are small and split
    in two if they are large. Gaussians that are too transparent or too large are pruned. The statistics are buffers of
    the geometry, so that a resumed run equals the uninterrupted one.

    After each step, means outside the ball are projected onto it. This happens even if ``enabled`` is false.
    """

    def __init__(self, gaussians: GaussianParameters, config: DensifyConfig) -> None:
        self._gaussians, self._config = gaussians, config
        self._pending: list[ScreenSpaceMeans] = []

    @property
    def enabled(self) -> bool:
        """Whether the number of Gaussians can change."""
        return self._config.enabled

    def step_pre_backward(self, projection: ScreenSpaceMeans) -> None:
        """Retain the gradients of the projected means.

        Several renders may precede one :meth:`step_post_backward`; their statistics are added.
        """
        if self.enabled and projection.means2d.requires_grad:
            projection.means2d.retain_grad()
            self._pending.append(projection)

    @torch.no_grad()
    def step_post_backward(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """Accumulate gradient statistics, densify and reset opacities when due, and keep means in the ball.

        Args:
            step: The optimizer step that has just been taken.
            optimizer: Optimizer of the parameters; its moments are resized with them.
            rng: Random streams for the means of split Gaussians; equal on all ranks.

        Raises:
            ValueError: Pruning would remove all Gaussians.
        """
        config, gaussians, done = self._config, self._gaussians, step + 1
        gaussians.means.mul_((gaussians.radius / gaussians.means.norm(dim=-1, keepdim=True)).clamp_max(1.0))
        pending, self._pending = self._pending, []
        if not config.enabled or done > config.end:
            return
        for projection in pending:
            self._accumulate(projection)
        if config.is_due(done):
            self._densify(step, optimizer, rng.shared()("densify", step, gaussians.device))
        if config.resets_at(done):
            limit = torch.logit(torch.tensor(2 * config.prune_opacity)).item()
            gaussians.opacity_logits.clamp_max_(limit)
            clear_moments(optimizer, gaussians.opacity_logits)

    def _accumulate(self, projection: ScreenSpaceMeans) -> None:
        """Add the screen-space gradient norms of one render to the statistics."""
        means2d, visible = projection.means2d, projection.visible.detach()
        if means2d.grad is None:
            return
        # Converts pixels to normalized device coordinates, and compensates for the mean over the cameras.
        units = means2d.new_tensor([0.5 * projection.width, 0.5 * projection.height]) * len(means2d)
        norms = (means2d.grad * units).norm(dim=-1)
        self._gaussians.gradient_sum += torch.where(visible, norms, 0.0).sum(dim=0)
        self._gaussians.views_seen += visible.sum(dim=0).to(norms.dtype)

    def _densify(self, step: int, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Clone, split and prune once, and clear the statistics."""
        config, owner = self._config, self._gaussians
        gaussians = owner.forward()
        mean = torch.where(owner.views_seen > 0, owner.gradient_sum / owner.views_seen.clamp_min(1), -1.0)
        masks = select_for_densification(config, mean, gaussians.scales, owner.radius)
        parents = GaussianSet(**{f.name: getattr(gaussians, f.name)[masks.split] for f in fields(GaussianSet)})
        new: dict[nn.Parameter, Tensor] = {}
        for parameter in (owner.means, owner.log_scales, owner.quaternions, owner.opacity_logits, owner.features):
            split = parameter[masks.split]
            new[parameter] = torch.cat([parameter[masks.clone], split, split])
        first = int(masks.clone.sum())
        new[owner.means][first:] = split_means(parents, generator)
        new[owner.log_scales][first:] -= torch.log(torch.tensor(config.split_factor)).item()
        pruned = prune_mask(config, gaussians.opacities, gaussians.scales, owner.radius)
        kept = ~prune_mask(config, new[owner.opacity_logits].sigmoid(), new[owner.log_scales].exp(), owner.radius)
        keep = ~pruned & ~masks.split
        if not bool(keep.any()) and not bool(kept.any()):
            raise ValueError(
                f"geometry.densify: pruning after step {step} would remove all Gaussians, because each has an opacity "
                f"below prune_opacity = {config.prune_opacity} or a standard deviation above prune_scale = "
                f"{config.prune_scale} radii; lower prune_opacity or raise prune_scale"
            )
        resize_rows(optimizer, {parameter: rows[kept] for parameter, rows in new.items()}, keep)
        owner.clear_statistics()


@dataclass(frozen=True)
class DensificationMasks:
    """Masks of the Gaussians to clone and to split.

    Attributes:
        clone: (N,) bool.
        split: (N,) bool; each of these is replaced by two Gaussians.
    """

    clone: Tensor
    split: Tensor


def select_for_densification(
    config: DensifyConfig, gradients: Tensor, scales: Tensor, radius: float
) -> DensificationMasks:
    """Select the Gaussians whose gradients reach the threshold; small ones are cloned, large ones are split.

    Args:
        config: Thresholds and bounds.
        gradients: (N,), mean screen-space gradient norms; negative for Gaussians that were never visible.
        scales: (N, 3), standard deviations, scene units.
        radius: Radius of the object's ball, scene units.
    """
    count = len(gradients)
    most = max(0, min(int(config.densify_fraction * count), config.max_points - count))
    reached = gradients >= config.grad_threshold
    largest = torch.zeros_like(reached)
    largest[gradients.sort(descending=True, stable=True).indices[:most]] = True
    small = scales.amax(dim=-1) <= config.size_threshold * radius
    return DensificationMasks(reached & largest & small, reached & largest & ~small)


def split_means(gaussians: GaussianSet, generator: torch.Generator) -> Tensor:
    """(2 N, 3) means, two drawn from each of N Gaussians: the first draws of all of them, then the second draws."""
    noise = torch.randn(2, *gaussians.means.shape, generator=generator, device=gaussians.means.device)
    offsets = torch.einsum("nij,pnj->pni", rotation_matrices(gaussians.quaternions), noise * gaussians.scales)
    return (gaussians.means + offsets).flatten(0, 1)


def prune_mask(config: DensifyConfig, opacities: Tensor, scales: Tensor, radius: float) -> Tensor:
    """(N,) bool, whether a Gaussian is too transparent or too large to be kept."""
    return (opacities < config.prune_opacity) | (scales.amax(dim=-1) > config.prune_scale * radius)
