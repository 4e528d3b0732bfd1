"""Reconstruction of a known object from posed images, to evaluate a representation without distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.evaluation.fidelity import psnr
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import TrainingStep
from scoredist3d.systems.clock import Clock
from scoredist3d.systems.objective import Objective
from scoredist3d.systems.scene import Scene
from scoredist3d.training.optimizer import build_optimizer, set_learning_rates


@dataclass(frozen=True)
class PosedViews:
    """Images of an object with their cameras.

    Attributes:
        cameras: (N) cameras.
        rgb: (N, H, W, 3) in [0, 1], straight color (not multiplied by alpha).
        alpha: (N, H, W, 1) in [0, 1], coverage by the object.
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
        """(N, H, W, 3) images composited over a background that broadcasts to them."""
        return self.rgb * self.alpha + background * (1.0 - self.alpha)


@dataclass
class FitSettings:
    """Settings of a reconstruction.

    Attributes:
        steps: Number of optimizer steps.
        batch_size: Number of views per step.
        optimizer: Optimizer and learning rates.
        losses: Regularizers by name.
        mask_weight: Weight of the mean squared error between opacity and alpha.
    """

    steps: int = 500
    batch_size: int = 2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: Mapping[str, ComponentConfig] = field(default_factory=dict)
    mask_weight: float = 1.0


@dataclass(frozen=True)
class ImageRegression:
    """Data term: mean squared errors of color and opacity against images.

    The images are composited over the background that the scene renders, so that the background is not reconstructed.

    Attributes:
        views: (B) views, rendered from their cameras.
        mask_weight: Weight of the opacity error.
    """

    views: PosedViews
    mask_weight: float

    def __call__(self, renders: Sequence[Render], clock: Clock, rng: Rng) -> TrainingStep:
        """The loss on the render of one scene, with its color and opacity terms to log."""
        (render,) = renders
        color = functional.mse_loss(render.rgb, self.views.over(render.background))
        mask = functional.mse_loss(render.opacity, self.views.alpha)
        return TrainingStep(color + self.mask_weight * mask, {"loss/color": color.detach(), "loss/mask": mask.detach()})


def fit_scene(
    scene: Scene,
    views: PosedViews,
    settings: FitSettings,
    rng: Rng,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Optimize a scene to reproduce posed images.

    Args:
        scene: Scene to optimize, in place.
        views: Target images; each step draws a batch of them without replacement.
        settings: Number of steps, batch size, optimizer and losses.
        rng: Source of all random numbers.
        on_step: Called after each step with the step number (from 0) and the loss.

    Returns:
        The loss of each step.
    """
    optimizer = build_optimizer(settings.optimizer, scene.parameter_groups())
    objective = Objective(settings.losses)
    history = []
    for step in range(settings.steps):
        set_learning_rates(optimizer, settings.optimizer, step)
        scene.prepare_step(step, rng)
        drawn = torch.randperm(len(views), generator=rng("views", step))[: settings.batch_size]
        batch = views[drawn.to(views.rgb.device)]
        data_term = ImageRegression(batch, settings.mask_weight)
        loss = objective([scene], batch.cameras, data_term, scene.clock, rng).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scene.post_backward(step, optimizer, rng)
        history.append(float(loss.detach()))
        if on_step is not None:
            on_step(step, history[-1])
    return history


@torch.no_grad()
def view_psnr(scene: Scene, views: PosedViews, background: float = 1.0) -> float:
    """PSNR in dB of the scene's renders against the views, both composited over the gray level ``background``."""
    images, wanted = [], []
    for index in range(len(views)):
        view = views[torch.tensor([index], device=views.rgb.device)]
        render = scene(view.cameras, step=scene.step, rng=None)
        images.append(render.rgb + (background - render.background) * (1.0 - render.opacity))
        wanted.append(view.over(background))
    return psnr(torch.cat(images), torch.cat(wanted))
