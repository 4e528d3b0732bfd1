"""Text to images: the same guidance on free images, where methods can be compared and taught."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config import ComponentConfig, component, option
from scoredist3d.registry import register
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System, TrainingStep, build_component, named_groups

if TYPE_CHECKING:
    from scoredist3d.config.experiment import PreviewConfig, TurntableConfig


@register("system", "text-to-2d", summary="Optimise free images so that each looks like the prompt.")
class TextTo2D(System):
    """Canvas -> (prior.encode) -> guidance. Particles share nothing, so each is one run of the method."""

    @dataclass
    class Config(System.Config):
        """The canvas and how it is looked at."""

        geometry: ComponentConfig = component("geometry", "image-canvas", "The images.")
        particles_per_step: int | None = option(
            None, "Particles in each step's batch, drawn without replacement; all of them where not given.", ge=1
        )
        view: tuple[float, float] | None = option(
            None,
            "Azimuth and elevation in degrees told to a camera-conditioned prior; no camera where not given.",
            ge=-180,
            le=180,
        )

        def validate(self) -> list[str]:
            """Only a canvas holds images."""
            problems = super().validate()
            if self.geometry is not None and self.geometry.type not in ("", "image-canvas"):
                problems.append(f"geometry.type: text-to-2d optimises an image-canvas, not {self.geometry.type}")
            particles = getattr(self.geometry, "particles", None)
            if self.particles_per_step is not None and particles is not None and self.particles_per_step > particles:
                problems.append(
                    f"particles_per_step: {self.particles_per_step} exceeds geometry.particles, which is {particles}"
                )
            return problems

    video_name = "optimisation"

    def __init__(
        self, config: Config, *, prior: nn.Module, prompt: str, negative_prompt: str = "", rng: Rng | None = None
    ) -> None:
        super().__init__(config, prior=prior, prompt=prompt, negative_prompt=negative_prompt, rng=rng)
        self.settings = config
        self.canvas = build_component(config.geometry, prior=prior, rng=rng)

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """Distillation loss of a batch of particles."""
        index = self._draw(step, rng)
        latents = self.canvas.latents(self.prior, index.to(self.device), rng("encode", step, self.device))
        branches = self.prompts(self._cameras(len(index)), batch=len(index))
        return self.guide(latents, branches, step, rng, particles=index.tolist())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, ``canvas``."""
        return named_groups("canvas", self.canvas)

    def preview(self, config: PreviewConfig) -> dict[str, Tensor]:
        """The particles, at the size they are optimised at."""
        return {"images": self.canvas.images(self.prior)}

    def frames(self, config: TurntableConfig, snapshots: Sequence[Path]) -> Iterator[Tensor]:
        """The preview grids saved while optimising, each held so long that there are ``config.frames`` or more."""
        hold = -(-config.frames // max(1, len(snapshots)))
        for path in snapshots:
            with Image.open(path) as image:
                frame = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0)
            yield from [frame] * hold

    def _draw(self, step: int, rng: Rng) -> Tensor:
        """The particles of this step, (B,) on the CPU."""
        particles = len(self.canvas.values)
        count = self.settings.particles_per_step
        if count is None or count == particles:
            return torch.arange(particles)
        return torch.randperm(particles, generator=rng("particles", step))[:count]

    def _cameras(self, batch: int) -> Cameras | None:
        if self.settings.view is None:
            return None
        azimuth, elevation = (torch.full((batch,), angle) for angle in self.settings.view)
        distance, fovy = torch.full((batch,), 3.0), torch.full((batch,), 40.0)
        return orbit(azimuth, elevation, distance, fovy, self.canvas.size, self.canvas.size).to(self.device)
