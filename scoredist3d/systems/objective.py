"""The loss of one training step on renders: a data term, the renderers' auxiliary losses and weighted regularizers.

Distillation (:mod:`scoredist3d.systems.text_to_3d`) and reconstruction from images
(:mod:`scoredist3d.training.reconstruction`) differ in the data term only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.losses.base import Loss
from scoredist3d.reasons import part
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import TrainingStep
from scoredist3d.systems.clock import Clock
from scoredist3d.systems.scene import Scene


class DataTerm(Protocol):
    """Loss on the renders of one step, computed from a prior's prediction or from target images."""

    def __call__(self, renders: Sequence[Render], clock: Clock, rng: Rng) -> TrainingStep:
        """The loss on the renders, one for each scene, and values to log."""


class Objective:
    """Objective that renders scenes and sums their loss: data term + auxiliary losses + sum_i weight_i regularizer_i.

    With several scenes, auxiliary losses and regularizers are averaged over the scenes.

    Attributes:
        losses: The regularizers by name.
    """

    def __init__(self, losses: Mapping[str, ComponentConfig]) -> None:
        self.losses: dict[str, Loss] = {name: registry.build(block) for name, block in losses.items()}

    def __call__(
        self,
        scenes: Sequence[Scene],
        cameras: Cameras,
        data_term: DataTerm,
        clock: Clock,
        rng: Rng,
        *,
        needs: Set[str] = frozenset(),
    ) -> TrainingStep:
        """The loss of one step.

        Args:
            scenes: Scenes to render.
            cameras: (B) cameras from which every scene is rendered.
            data_term: Loss on the renders.
            clock: Current step; renders use its scene step, and all other terms use its run step.
            rng: Random streams of this rank.
            needs: Names of the optional maps that the data term reads.
        """
        step = clock.run_step
        # Terms with zero weight are skipped, and so are the maps that only these terms need.
        active = {name: loss for name, loss in self.losses.items() if loss.weight(step) != 0.0}
        needs = frozenset(needs).union(*(loss.needs for loss in active.values()))
        with part("the render"):
            renders = [
                replace(scene(cameras, step=clock.scene_step, rng=rng, needs=needs), cameras=cameras)
                for scene in scenes
            ]
        for scene, render in zip(scenes, renders, strict=True):
            scene.pre_backward(render)
        data = data_term(renders, clock, rng)
        total, scalars = data.loss, dict(data.scalars)
        for name in renders[0].auxiliary_losses:
            value = torch.stack([render.auxiliary_losses[name] for render in renders]).mean()
            total = total + value
            scalars[f"loss/{name}"] = value.detach()
        for name, loss in active.items():
            with part(f"the loss {name}"):
                value = _mean(loss, scenes, renders, step, rng)
            weighted = loss.weight(step) * value
            total = total + weighted
            scalars[f"loss/{name}"] = value.detach()
            scalars[f"weighted/{name}"] = weighted.detach()
        scalars["opacity"] = torch.cat([render.opacity.detach() for render in renders]).mean()
        return TrainingStep(total, scalars)


def _mean(loss: Loss, scenes: Sequence[Scene], renders: Sequence[Render], step: int, rng: Rng) -> Tensor:
    """The unweighted regularizer, averaged over the scenes."""
    values = [loss(render, scene.geometry, step, rng) for scene, render in zip(scenes, renders, strict=True)]
    return torch.stack(values).mean()
