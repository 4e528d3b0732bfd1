"""Text to images: optimizes images directly with a guidance, to compare and teach methods."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config import ComponentConfig, component, option, under
from scoredist3d.geometry.image_canvas import ImageCanvas
from scoredist3d.limits import MAX_BATCH
from scoredist3d.reasons import part
from scoredist3d.registry import register
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import GuidedSystem, SystemInputs, TrainingStep, named_groups

_log = logging.getLogger(__name__)


@register("system", "text-to-2d", summary="Optimize images directly so that they match the prompt.")
class TextTo2D(GuidedSystem):
    """Optimizes images by distillation: canvas -> (prior.encode) -> guidance.

    Particles are separate images. They interact only if the method couples them, such as VSD, whose second network is
    trained on all of them.
    """

    @dataclass
    class Config(GuidedSystem.Config):
        """Options of the canvas and its conditioning."""

        geometry: ComponentConfig = component("geometry", "image-canvas", "Images to optimize.")
        particles_per_step: int | None = option(
            None,
            "Particles in each step's batch, drawn without replacement; null uses all of them.",
            ge=1,
            le=MAX_BATCH,
        )
        view: tuple[float, float] | None = option(
            None,
            "Azimuth and elevation in degrees that condition a camera-conditioned prior; null passes no camera to it.",
            ge=-180,
            le=180,
        )

        def validate(self) -> list[str]:
            """Problems with the block: a geometry other than a canvas, or more particles per step than exist."""
            problems = super().validate()
            if self.geometry is not None and self.geometry.type not in ("", "image-canvas"):
                problems.append(f"geometry.type: text-to-2d optimizes an image-canvas, not {self.geometry.type}")
            particles = getattr(self.geometry, "particles", None)
            if self.particles_per_step is not None and particles is not None and self.particles_per_step > particles:
                problems.append(
                    f"particles_per_step: {self.particles_per_step} exceeds geometry.particles, which is {particles}"
                )
            return problems

    config: Config

    def assemble(self, inputs: SystemInputs) -> None:
        """Build guidance, prompts and canvas."""
        super().assemble(inputs)
        config = self.config
        view = None if config.view is None else _cameras_at(config.view, 1, self.prior.image_size)
        edits = self.guidance.needs_source
        canvas: Any = config.geometry
        with under("geometry"):
            self.canvas = ImageCanvas(canvas, prior=self.prior, rng=inputs.rng, view=view, keep_start=edits)
        if edits and not self.canvas.starts_from_images:
            _log.warning(
                f"guidance.type: {config.guidance.type} edits images, but the initial images are noise; set "
                "geometry.init_prompt or geometry.init_image to the images to edit."
            )

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """Distillation loss of a batch of particles; editing methods also get the latents of their initial images."""
        drawn = self._draw(step, rng.shared())
        index, device = drawn.to(self.device), self.device
        with under("geometry"), part("the encoding of the images"):
            latents = self.canvas.latents(self.prior, index, rng("encode", step, device))
        source = None
        if self.guidance.needs_source:
            # This uses the same encoder noise as above, so that the latents differ only where the image was edited.
            source = self.canvas.source(self.prior, index, rng("encode", step, device))
        conditions = self.prompts(self._cameras(len(index)), batch=len(index))
        rgb = self.canvas.pixels(self.prior, index)
        return self.guide(latents, conditions, step, rng, rgb=rgb, particles=drawn.tolist(), source=source)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The only parameter group, ``canvas``."""
        return named_groups("canvas", self.canvas)

    def images(self) -> Tensor:
        """The particles, (N, H, W, 3) in [0, 1], at the size at which they are optimized."""
        return self.canvas.images(self.prior)

    def _draw(self, step: int, rng: Rng) -> Tensor:
        """Indices of the particles of a step, (B,) on the CPU.

        The indices are equal on all ranks. Methods store data for each particle under its index.
        """
        particles = len(self.canvas.values)
        count = self.config.particles_per_step
        if count is None or count == particles:
            return torch.arange(particles)
        return torch.randperm(particles, generator=rng("particles", step))[:count]

    def _cameras(self, batch: int) -> Cameras | None:
        view = self.config.view
        return None if view is None else _cameras_at(view, batch, self.canvas.size).to(self.device)


def _cameras_at(view: tuple[float, float], batch: int, size: int) -> Cameras:
    """Identical cameras at an azimuth and elevation in degrees, on which the prior is conditioned."""
    azimuth, elevation, distance, fovy = (torch.full((batch,), value) for value in (*view, 3.0, 40.0))
    return orbit(azimuth, elevation, distance, fovy, size, size)
