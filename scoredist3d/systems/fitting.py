"""Fitting a scene to posed views of a known object: what a representation can do, without any distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.seeding import Rng
from scoredist3d.systems.optimizer import OptimizerConfig, build_optimizer, set_learning_rates
from scoredist3d.systems.scene import Scene


@dataclass(frozen=True)
class PosedViews:
    """Pictures of an object with the cameras that took them.

    Attributes:
        cameras: (N).
        rgb: (N, H, W, 3), straight colour (not multiplied by the coverage), [0, 1].
        alpha: (N, H, W, 1), coverage in [0, 1].
    """

    cameras: Cameras
    rgb: Tensor
    alpha: Tensor

    def __len__(self) -> int:
        return len(self.cameras)

    def __getitem__(self, index: Tensor) -> PosedViews:
        """The views at (B,) indices."""
        return PosedViews(self.cameras[index], self.rgb[index], self.alpha[index])

    def to(self, device: torch.device | str) -> PosedViews:
        """The same views on another device."""
        return PosedViews(self.cameras.to(device), self.rgb.to(device), self.alpha.to(device))

    def over(self, background: Tensor | float) -> Tensor:
        """(N, H, W, 3) over a background that broadcasts."""
        return self.rgb * self.alpha + background * (1.0 - self.alpha)


@dataclass
class FitSettings:
    """How a scene is fitted.

    Attributes:
        steps: Optimiser steps.
        batch_size: Views per step.
        optimizer: Optimiser and learning rates.
        losses: Regularisers by name.
        mask_weight: Factor of the squared difference of opacity and coverage.
    """

    steps: int = 500
    batch_size: int = 2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: Mapping[str, ComponentConfig] = field(default_factory=dict)
    mask_weight: float = 1.0


def fit_scene(
    scene: Scene,
    views: PosedViews,
    settings: FitSettings,
    rng: Rng,
    on_step: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Minimise the squared difference to the views over the scene's own backgrounds; one loss per step is returned.

    The views of a step are drawn without replacement. ``on_step`` is told the step and its loss.
    """
    optimizer = build_optimizer(settings.optimizer, scene.parameter_groups())
    losses = {name: registry.build(block) for name, block in settings.losses.items()}
    history = []
    for step in range(settings.steps):
        set_learning_rates(optimizer, settings.optimizer, step)
        scene.prepare_step(step, rng)
        drawn = torch.randperm(len(views), generator=rng("views", step))[: settings.batch_size]
        seen = views[drawn.to(views.rgb.device)]
        active = {name: loss for name, loss in losses.items() if loss.weight(step) != 0.0}
        needs = frozenset().union(*(loss.needs for loss in active.values()))
        render = scene(seen.cameras, step=scene.step, rng=rng, needs=needs)
        total = functional.mse_loss(render.rgb, seen.over(render.background))
        total = total + settings.mask_weight * functional.mse_loss(render.opacity, seen.alpha)
        for term in render.auxiliary.values():
            total = total + term
        for loss in active.values():
            total = total + loss.weight(step) * loss(render, scene.geometry, step, rng)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        scene.geometry.after_step(step, optimizer, rng)
        history.append(float(total.detach()))
        if on_step is not None:
            on_step(step, history[-1])
    return history


@torch.no_grad()
def view_psnr(scene: Scene, views: PosedViews, background: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of the scene's renders against the views, both over one gray level."""
    error = 0.0
    for index in range(len(views)):
        view = views[torch.tensor([index], device=views.rgb.device)]
        render = scene(view.cameras, step=scene.step, rng=None)
        shown = render.rgb - render.background * (1.0 - render.opacity) + background * (1.0 - render.opacity)
        error += float((shown - view.over(background)).square().mean())
    return -10.0 * float(torch.tensor(error / len(views)).log10())
