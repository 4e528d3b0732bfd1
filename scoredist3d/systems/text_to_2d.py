"""Text to images: the same guidance on free images, where methods can be compared and taught."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config import ComponentConfig, component, option, under
from scoredist3d.geometry.image_canvas import ImageCanvas
from scoredist3d.registry import register
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import GuidedSystem, TrainingStep, named_groups

if TYPE_CHECKING:
    from scoredist3d.config.experiment import PreviewConfig, TurntableConfig

_log = logging.getLogger(__name__)


@register("system", "text-to-2d", summary="Optimise free images so that each looks like the prompt.")
class TextTo2D(GuidedSystem):
    """Canvas -> (prior.encode) -> guidance. Particles share nothing, so each is one run of the method."""

    @dataclass
    class Config(GuidedSystem.Config):
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
        self,
        config: Config,
        *,
        prior: nn.Module,
        prompt: str,
        negative_prompt: str = "",
        cameras: Any = None,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(config, prior=prior, prompt=prompt, negative_prompt=negative_prompt, rng=rng)
        self.settings = config
        view = None if config.view is None else _cameras_at(config.view, 1, self.prior.image_size)
        edits = self.guidance.needs_source
        canvas: Any = config.geometry
        self.canvas = ImageCanvas(canvas, prior=self.prior, rng=rng, view=view, keep_start=edits)
        if edits and not self.canvas.starts_from_images:
            _log.warning(
                f"guidance.type: {config.guidance.type} edits, and these images start as noise; set "
                "geometry.init_prompt or geometry.init_image to what should be edited."
            )

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """Distillation loss of a batch of particles; methods that edit see them as they were at the start, too."""
        drawn = self._draw(step, rng.shared())
        index, device = drawn.to(self.device), self.device
        with under("geometry"):
            latents = self.canvas.latents(self.prior, index, rng("encode", step, device))
        source = None
        if self.guidance.needs_source:
            # The same draw of the encoder's, so that only what was changed differs.
            source = self.canvas.source(self.prior, index, rng("encode", step, device))
        conditions = self.prompts(self._cameras(len(index)), batch=len(index))
        rgb = self.canvas.pixels(self.prior, index)
        return self.guide(latents, conditions, step, rng, rgb=rgb, particles=drawn.tolist(), source=source)

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
        """The particles of this step, (B,) on the CPU; equal on all ranks, as methods may keep state per particle."""
        particles = len(self.canvas.values)
        count = self.settings.particles_per_step
        if count is None or count == particles:
            return torch.arange(particles)
        return torch.randperm(particles, generator=rng("particles", step))[:count]

    def _cameras(self, batch: int) -> Cameras | None:
        view = self.settings.view
        return None if view is None else _cameras_at(view, batch, self.canvas.size).to(self.device)


def _cameras_at(view: tuple[float, float], batch: int, size: int) -> Cameras:
    """Equal cameras in a direction, told to the prior about images that no camera took."""
    azimuth, elevation, distance, fovy = (torch.full((batch,), value) for value in (*view, 3.0, 40.0))
    return orbit(azimuth, elevation, distance, fovy, size, size)
