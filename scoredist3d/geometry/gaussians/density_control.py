"""Adaptive density control of Gaussians (arXiv 2308.04079, section 5), with the optimiser's moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoredist3d.config import option
from scoredist3d.geometry.base import GaussianSet
from scoredist3d.ops.rotations import rotation_matrices


@dataclass
class DensifyConfig:
    """When Gaussians are added and removed, in optimiser steps of the run."""

    enabled: bool = option(True, "Add and remove Gaussians while training, which a run on several devices cannot.")
    start: int = option(500, "Steps before the first densification.", ge=0)
    end: int = option(15000, "Steps after which the number of Gaussians stays.", ge=0)
    every: int = option(100, "Steps between two densifications.", ge=1)
    grad_threshold: float = option(
        2e-4,
        "Gaussians whose mean gradient in the image is at least this grow; per unit of normalised device coordinates.",
        ge=0,
    )
    grow_fraction: float = option(
        1.0, "At most this fraction of the Gaussians grows at a time, those of the largest gradients.", ge=0, le=1
    )
    size_threshold: float = option(
        0.02, "Growing Gaussians are cloned up to this largest deviation, split above; fraction of the radius.", ge=0
    )
    split_factor: float = option(1.6, "The two parts of a split one have deviations smaller by this factor.", gt=1)
    prune_opacity: float = option(0.005, "Gaussians less opaque than this are removed.", ge=0, lt=0.5)
    prune_scale: float = option(
        0.5, "Gaussians with a larger deviation than this are removed; fraction of the radius.", gt=0
    )
    opacity_reset_every: int = option(
        3000, "Steps between two resets of all opacities to at most twice prune_opacity; 0: never.", ge=0
    )
    max_points: int = option(200_000, "Most Gaussians there may be.", ge=1)

    def is_due(self, done: int) -> bool:
        """Whether to densify after ``done`` steps."""
        return self.start <= done <= self.end and done % self.every == 0

    def resets_at(self, done: int) -> bool:
        """Whether to reset opacities after ``done`` steps: never at the end, since what is left then is removed."""
        return self.opacity_reset_every > 0 and done < self.end and done % self.opacity_reset_every == 0


@dataclass(frozen=True)
class Growth:
    """What a densification does to N Gaussians.

    Attributes:
        clone, split: (N,) bool; a split one is replaced by two.
    """

    clone: Tensor
    split: Tensor


def choose_growth(config: DensifyConfig, gradients: Tensor, scales: Tensor, radius: float) -> Growth:
    """Which Gaussians grow: those of a gradient of at least the threshold, the small ones cloned, the large ones split.

    Args:
        config: Thresholds and bounds.
        gradients: (N,), mean norm of the gradient at the mean's place in the image; negative where never seen.
        scales: (N, 3).
        radius: Of the ball.
    """
    count = len(gradients)
    most = max(0, min(int(config.grow_fraction * count), config.max_points - count))
    grows = gradients >= config.grad_threshold
    first = torch.zeros_like(grows)
    first[gradients.sort(descending=True, stable=True).indices[:most]] = True
    small = scales.amax(dim=-1) <= config.size_threshold * radius
    return Growth(grows & first & small, grows & first & ~small)


def split_means(gaussians: GaussianSet, generator: torch.Generator) -> Tensor:
    """(2 N, 3) means of the parts, drawn from each Gaussian: first parts first."""
    noise = torch.randn(2, *gaussians.means.shape, generator=generator, device=gaussians.means.device)
    offsets = torch.einsum("nij,pnj->pni", rotation_matrices(gaussians.quaternions), noise * gaussians.scales)
    return (gaussians.means + offsets).flatten(0, 1)


def is_spent(config: DensifyConfig, opacities: Tensor, scales: Tensor, radius: float) -> Tensor:
    """(N,) bool: too transparent, or too large, to be kept."""
    return (opacities < config.prune_opacity) | (scales.amax(dim=-1) > config.prune_scale * radius)


def resize_rows(optimizer: torch.optim.Optimizer, rows: Mapping[nn.Parameter, Tensor], keep: Tensor) -> None:
    """Keep some rows of parameters and append others; the optimiser's moments go with them, new rows start with zeros.

    The parameters stay the same objects, so that optimiser and module go on holding them; their gradients are dropped.

    Args:
        optimizer: Any that keeps per-parameter state of the parameter's shape (Adam's moments, momentum).
        rows: (M, ...) new rows of each parameter (N, ...).
        keep: (N,) bool.
    """
    for parameter, new in rows.items():
        for state in _states(optimizer, parameter):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.cat([value[keep], value.new_zeros(new.shape)])
        replace_values(parameter, torch.cat([parameter.detach()[keep], new]))


def clear_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Forget what the optimiser has remembered of the parameter's gradients."""
    for state in _states(optimizer, parameter):
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.zero_()


def replace_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values, of another length perhaps; it stays the same object, without a gradient."""
    parameter.grad = None
    # Autograd remembers the shape for as long as an earlier graph lives; a change of type makes it forget.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values


def _states(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[dict[str, object]]:
    """The parameter's state in the optimiser, or in the members of one that is made of several."""
    for member in getattr(optimizer, "optimizers", (optimizer,)):
        if parameter in member.state:
            yield member.state[parameter]
