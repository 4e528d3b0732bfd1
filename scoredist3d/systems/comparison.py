"""Several methods side by side: the same prompt, prior, seed and starting images for each of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d import registry
from scoredist3d.config import ComponentConfig, component, component_map, option, under
from scoredist3d.registry import near_matches, register
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System, TrainingStep
from scoredist3d.systems.text_to_2d import TextTo2D

if TYPE_CHECKING:
    from scoredist3d.config.experiment import PreviewConfig, TurntableConfig


@register("system", "comparison", summary="Optimise the same images by several methods side by side.")
class Comparison(System):
    """One text-to-2d system per method, stepped together.

    Every method sees the same step and the same random streams, and has its own optimiser: it does exactly what it does
    alone with the same seed and canvas.
    """

    @dataclass
    class Config(System.Config):
        """The methods, and what they have in common."""

        methods: dict[str, ComponentConfig] = component_map("system", "Text-to-2d blocks, by the label on the sheet.")
        only: list[str] = option([], "Labels of the methods to run, in this order; all of them where empty.")
        geometry: ComponentConfig = component(
            "geometry", "image-canvas", "What every method starts from; those that edit keep a canvas of their own."
        )

        def validate(self) -> list[str]:
            """Known labels of blocks of images."""
            problems = super().validate()
            for label in self.only:
                if label not in self.methods:
                    known = list(self.methods)
                    hint = near_matches(label, known)
                    problems.append(f"only: there is no method {label!r}.{hint} Methods are {', '.join(known)}")
            for label, block in self.methods.items():
                if block is not None and block.type != "text-to-2d":
                    problems.append(
                        f"methods.{label}.type: a comparison is between text-to-2d systems, not {block.type}"
                    )
            return problems

        @property
        def chosen(self) -> list[str]:
            """Labels of the methods that run, in order."""
            return self.only or list(self.methods)

    video_name = "optimisation"
    label_rows = True

    def __init__(
        self,
        config: Config,
        *,
        prior: nn.Module,
        prompt: str,
        negative_prompt: str = "",
        cameras: Any = None,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(config, prior=prior)
        if not config.methods:
            raise ValueError("system.methods is empty: give at least one text-to-2d block, as compare.yaml does")
        blocks = {label: _on_canvas(config.methods[label], config.geometry) for label in config.chosen}
        runtime: dict[str, Any] = {"prior": prior, "prompt": prompt, "negative_prompt": negative_prompt, "rng": rng}
        systems: dict[str, TextTo2D] = {}
        for label, block in blocks.items():
            with under(f"methods.{label}"):
                systems[label] = registry.build(block, **runtime)
        # Labels are the user's: only ModuleList takes any.
        self.systems = nn.ModuleList(systems.values())
        self.labels = tuple(systems)
        self.config = copy.copy(config)
        self.config.optimizer = dataclasses.replace(
            config.optimizer, lr_groups=_learning_rates(blocks) | config.optimizer.lr_groups
        )

    @property
    def methods(self) -> dict[str, TextTo2D]:
        """The system of each method, by label."""
        return dict(zip(self.labels, self.systems, strict=True))  # type: ignore[arg-type]

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """The sum of the methods' losses, each with its own log entries: ``loss/sds``, ``sds/t``, ..."""
        scalars: dict[str, Tensor | float] = {}
        losses = []
        for label, system in self.methods.items():
            with under(f"methods.{label}"):
                result = system.training_step(step, rng)
            losses.append(result.loss)
            for key, value in result.scalars.items():
                group, _, name = key.partition("/")
                scalars[f"{label}/{name}" if group == "guidance" else f"{group}/{label}"] = value
        return TrainingStep(torch.stack(losses).sum(), scalars)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Each method's groups, ``<label>.canvas``, with its own optimiser."""
        return [
            group | {"name": f"{label}.{group['name']}", "optimizer": system.config.optimizer}
            for label, system in self.methods.items()
            for group in system.parameter_groups()
        ]

    def prepare_step(self, step: int, rng: Rng) -> None:
        """That of every method."""
        for system in self.methods.values():
            system.prepare_step(step, rng)

    def preview(self, config: PreviewConfig) -> dict[str, Tensor]:
        """One row of images per method, of ``preview.size`` pixels; shorter rows are filled up with white."""
        rows = {label: system.preview(config)["images"] for label, system in self.methods.items()}
        columns = max(len(images) for images in rows.values())
        return {label: _resized(images, config.size, columns) for label, images in rows.items()}

    def frames(self, config: TurntableConfig, snapshots: Sequence[Path]) -> Iterator[Tensor]:
        """The sheets saved while optimising."""
        return next(iter(self.methods.values())).frames(config, snapshots)


def _on_canvas(block: Any, canvas: ComponentConfig) -> Any:
    """A method's block with the common canvas; one that edits starts from what it edits."""
    method: Any = registry.entry_of(block.guidance).cls
    if method.needs_source:
        return block
    block = copy.copy(block)
    block.geometry = canvas
    return block


def _learning_rates(blocks: dict[str, Any]) -> dict[str, Any]:
    """Each method's schedules, by the names that its groups have in the comparison."""
    rates = {}
    for label, block in blocks.items():
        rates[label] = block.optimizer.lr
        rates |= {f"{label}.{group}": rate for group, rate in block.optimizer.lr_groups.items()}
    return rates


def _resized(images: Tensor, size: int, columns: int) -> Tensor:
    """(columns, size, size, 3) of (N, H, W, 3)."""
    scaled = functional.interpolate(images.movedim(-1, 1), (size, size), mode="bilinear", antialias=True)
    filling = scaled.new_ones(columns - len(scaled), *scaled.shape[1:])
    return torch.cat([scaled, filling]).movedim(1, -1).clamp(0.0, 1.0)
