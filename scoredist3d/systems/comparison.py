"""Comparison of several methods with the same prompt, prior, seed and initial images."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.config import ComponentConfig, component, component_map, option, under
from scoredist3d.registry import near_matches, register
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System, SystemInputs, TrainingStep
from scoredist3d.systems.modules import TypedModuleList
from scoredist3d.systems.text_to_2d import TextTo2D


@register("system", "comparison", summary="Optimize the same images with several methods side by side.")
class Comparison(System):
    """System that contains one text-to-2d system per method and steps them together.

    All methods use the same step and the same random streams, and each has its own optimizer. A method therefore
    computes exactly what it would compute alone with the same seed and canvas.

    Attributes:
        systems: The system of each method.
        labels: The label of each method.
    """

    @dataclass
    class Config(System.Config):
        """The methods and their common canvas."""

        methods: dict[str, ComponentConfig] = component_map("system", "Text-to-2d blocks by label.")
        only: list[str] = option([], "Labels of the methods to run, in this order; an empty list runs all.")
        geometry: ComponentConfig = component(
            "geometry",
            "image-canvas",
            "Initial images of every method; editing methods use the canvas of their own block.",
        )

        def validate(self) -> list[str]:
            """Problems with the block: unknown labels, or methods that are not text-to-2d systems."""
            problems = super().validate()
            for label in self.only:
                if label not in self.methods:
                    known = list(self.methods)
                    hint = near_matches(label, known)
                    problems.append(f"only: there is no method {label!r}.{hint} The methods are {', '.join(known)}")
            for label, block in self.methods.items():
                if block is not None and block.type != "text-to-2d":
                    problems.append(f"methods.{label}.type: a comparison takes text-to-2d systems, not {block.type}")
            return problems

        @property
        def chosen(self) -> list[str]:
            """Labels of the methods that run, in order."""
            return self.only or list(self.methods)

    config: Config

    def assemble(self, inputs: SystemInputs) -> None:
        """Build one text-to-2d system per method."""
        config = self.config
        if not config.methods:
            raise ValueError("system.methods is empty: give at least one text-to-2d block, as compare.yaml does")
        blocks = {label: _on_canvas(config.methods[label], config.geometry) for label in config.chosen}
        systems: dict[str, TextTo2D] = {}
        for label, block in blocks.items():
            with under(f"methods.{label}"):
                systems[label] = registry.build(
                    block,
                    prior=self.prior,
                    prompt=inputs.prompt,
                    negative_prompt=inputs.negative_prompt,
                    rng=inputs.rng,
                )
        # A list instead of a dict: module names cannot contain every character that a user's label may contain.
        self.systems: TypedModuleList[TextTo2D] = TypedModuleList(systems.values())
        self.labels = tuple(systems)
        self.config = copy.copy(config)
        self.config.optimizer = dataclasses.replace(
            config.optimizer, lr_groups=_learning_rates(blocks) | config.optimizer.lr_groups
        )

    @property
    def methods(self) -> dict[str, TextTo2D]:
        """The system of each method, by label."""
        return dict(zip(self.labels, self.systems, strict=True))

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """The sum of the methods' losses, with log entries for each method: ``loss/sds``, ``sds/t``, ..."""
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
        """Each method's group, ``<label>.canvas``, with the method's own optimizer config."""
        return [
            group | {"name": f"{label}.{group['name']}", "optimizer": system.config.optimizer}
            for label, system in self.methods.items()
            for group in system.parameter_groups()
        ]

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Update step-dependent state of every method."""
        for system in self.methods.values():
            system.prepare_step(step, rng)


def _on_canvas(block: Any, canvas: ComponentConfig) -> Any:
    """A method's block with the common canvas; the block of an editing method is unchanged."""
    method: Any = registry.entry_of(block.guidance).cls
    if method.needs_source:
        return block
    block = copy.copy(block)
    block.geometry = canvas
    return block


def _learning_rates(blocks: dict[str, Any]) -> dict[str, Any]:
    """Learning-rate schedules of all methods, keyed by the names of their groups in the comparison."""
    rates = {}
    for label, block in blocks.items():
        rates[label] = block.optimizer.lr
        rates |= {f"{label}.{group}": rate for group, rate in block.optimizer.lr_groups.items()}
    return rates
