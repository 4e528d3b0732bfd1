"""Estimated surface loss: differences of a render from the normals and depths that a network estimates from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.procedural.surface_estimator import SurfaceEstimator, surface_difference
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng


@register(
    "loss",
    "estimated-surface",
    summary="Differences of the normals and depths from those that a network estimates from the rendered colors.",
    arxiv="2206.00665",
)
class EstimatedSurface(Loss):
    """Mean over the pixels of :func:`~scoredist3d.procedural.surface_estimator.surface_difference`.

    MonoSDF estimates normals and depths from photographs; here they are estimated from the render itself, whose colors
    the guidance determines. The gradient passes through the rendered normals and depths only. A prior adds light and
    shade to the colors, e.g. in the dark inside of a mug; with this loss, the surface takes the shape that they show.
    """

    @dataclass
    class Config(Loss.Config):
        """Options of the estimated surface loss."""

        normal_weight: float = option(1.0, "Weight lambda_n of the normals within the loss.", ge=0)
        depth_weight: float = option(10.0, "Weight lambda_d of the depths within the loss, per scene unit.", ge=0)
        estimator: str = option(
            "embedded",
            "Network that estimates normals and depths: embedded, for images of the embedded prior, or a folder "
            "written by scripts/train_surface_estimator.py.",
        )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # Gradients of rendered normals take as long as all of the rest of a step on a signed distance field.
        self.needs = frozenset({"normal"}) if config.normal_weight else frozenset()
        self._network = SurfaceEstimator.named(config.estimator, "estimator")

    def __call__(self, render: Render, geometry: Geometry, step: int, rng: Rng) -> Tensor:
        """The loss, averaged over all pixels.

        Raises:
            ValueError: The render has no normals or no cameras, or its colors are latents.
        """
        if render.cameras is None or render.rgb.shape[-1] != 3:
            raise ValueError("system.loss.estimated-surface: needs RGB renders with their cameras; remove the loss")
        network = self._network.to(render.rgb.device)
        with torch.no_grad():
            estimate = network(render.rgb.float(), render.background.float(), render.cameras)
        normal = render.get("normal") if self.config.normal_weight else estimate.normal
        weights = {"normal_weight": self.config.normal_weight, "depth_weight": self.config.depth_weight}
        return surface_difference(estimate, normal, render.depth, render.opacity.detach(), **weights).mean()
