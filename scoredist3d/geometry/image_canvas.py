"""A stack of images as the representation: where methods are compared without a renderer in between."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, FieldError, option
from scoredist3d.priors.base import CFGConditions, Prior
from scoredist3d.priors.sampling import denoise
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_log = logging.getLogger(__name__)

_SAMPLED_TOGETHER = 8  # images, to bound the memory that starting images take


@register("geometry", "image-canvas", summary="N independent images, as pixels or latents; for text-to-2d only.")
class ImageCanvas(nn.Module):
    """``N`` particles that are optimised independently.

    ``pixels`` holds display values around [0, 1] without any squashing (the identity renderer of the score distillation
    literature); ``latents`` holds what the prior's denoiser sees, so that encoder and decoder take no part.

    The particles start as noise, as one image from a file, or as samples of the prior. The latter two need the prior on
    its device, so they are made when the canvas is first looked at; a loaded state is never started anew. Two canvases
    of one config, prior, view and ``rng`` start from the same images.

    Attributes:
        values: (N, C, h, w) latents or (N, H, W, 3) pixels.
        start: The values as they were at the start, saved with the state; only with ``keep_start``.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of the canvas."""

        parametrisation: Literal["pixels", "latents"] = option("latents", "What is optimised.")
        particles: int = option(4, "Number of images.", ge=1)
        size: int | None = option(None, "Pixels per side; the prior's own size where not given.", ge=8, le=4096)
        initial_std: float = option(
            1.0, "Deviation of the normal initialisation, in units of latents; pixels use half of it around gray.", ge=0
        )
        init_image: str | None = option(
            None,
            "Image file (PNG, JPEG, ...) that every particle starts from; scaled to the canvas, its centre cut out.",
            file=True,
        )
        init_prompt: str | None = option(
            None,
            "Text whose samples the particles start from, each from noise of its own; empty samples without a text.",
        )
        init_steps: int = option(25, "Denoising steps of those samples.", ge=1)
        init_scale: float = option(5.0, "Guidance scale of those samples.")

        def validate(self) -> list[str]:
            """One start only."""
            if self.init_image is not None and self.init_prompt is not None:
                return ["init_image: the particles start from an image or from init_prompt, not from both; drop one"]
            return []

    def __init__(
        self,
        config: Config,
        *,
        prior: Prior,
        rng: Rng | None = None,
        view: Cameras | None = None,
        keep_start: bool = False,
    ) -> None:
        """Args:
        config: Options.
        prior: Tells the sizes, and makes the starting images where they are asked for.
        rng: Draws the start; equal on all ranks.
        view: One camera, told to a camera-conditioned prior with ``init_prompt``.
        keep_start: Keep a copy of the start, for methods that edit.
        """
        super().__init__()
        self.config = config
        self.size: int = config.size or prior.image_size
        self._rng, self._view = (rng or Rng()).shared(), view
        generator = self._rng("canvas")
        if config.parametrisation == "latents":
            shape = (config.particles, *prior.latent_shape(self.size, self.size))
            values = config.initial_std * torch.randn(shape, generator=generator)
        else:
            shape = (config.particles, self.size, self.size, 3)
            values = 0.5 + 0.5 * config.initial_std * torch.randn(shape, generator=generator)
        self.values = nn.Parameter(values)
        self.start: Tensor | None
        self.register_buffer("start", values.clone() if keep_start else None)
        self._waiting = self.starts_from_images
        self.register_load_state_dict_post_hook(_stop_waiting)

    @property
    def starts_from_images(self) -> bool:
        """Whether the particles start from something to be seen, rather than from noise."""
        return self.config.init_image is not None or self.config.init_prompt is not None

    def latents(self, prior: Prior, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w) of the particles in ``index`` (B,), differentiable; pixels pass the prior's encoder."""
        self.begin(prior)
        return self._as_latents(self.values[index], prior, generator)

    def pixels(self, prior: Prior, index: Tensor) -> Tensor | None:
        """(B, H, W, 3) of the particles in ``index`` (B,), differentiable; None where latents are optimised."""
        self.begin(prior)
        return self.values[index] if self.config.parametrisation == "pixels" else None

    @torch.no_grad()
    def source(self, prior: Prior, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w), what :meth:`latents` would have been at the start; needs ``keep_start``."""
        self.begin(prior)
        if self.start is None:
            raise ValueError("the canvas keeps no copy of its start; construct it with keep_start")
        return self._as_latents(self.start[index], prior, generator)

    @torch.no_grad()
    def images(self, prior: Prior) -> Tensor:
        """(N, H, W, 3) in [0, 1]; latents pass the prior's decoder."""
        self.begin(prior)
        values = prior.decode(self.values) if self.config.parametrisation == "latents" else self.values
        return values.clamp(0.0, 1.0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, ``canvas``."""
        return [{"name": "canvas", "params": [self.values]}]

    @torch.no_grad()
    def begin(self, prior: Prior) -> None:
        """Make the starting images where they come from a file or from the prior and are not there yet.

        Raises:
            ValueError: The file cannot be read, or its latents do not fit the canvas.
        """
        if not self._waiting:
            return
        config, particles = self.config, self.config.particles
        latents = config.parametrisation == "latents"
        if config.init_image is not None:
            image = load_image(config.init_image, self.size).to(self.values)[None]
            values = prior.encode(image) if latents else image
        else:
            values = self._sampled(prior, config.init_prompt or "")
            values = values if latents else _scaled(prior.decode(values), self.size).clamp(0.0, 1.0)
        if values.shape[1:] != self.values.shape[1:]:
            raise FieldError(
                f"this prior encodes images at {prior.image_size} pixels, so latents can start from "
                f"an image only at that size, not at {self.size}",
                "size",
            )
        self.values.copy_(values.expand(particles, *values.shape[1:]))
        if self.start is not None:
            self.start.copy_(self.values)
        self._waiting = False

    def _sampled(self, prior: Prior, prompt: str) -> Tensor:
        """(N, C, h, w): deterministic samples of the prior, particle i from noise that is a function of seed and i."""
        count, device = self.config.particles, self.values.device
        unknown = prior.unknown_words(prompt)
        if unknown:
            words = ", ".join(repr(word) for word in unknown)
            _log.warning(
                f"geometry.init_prompt: the prior has never seen {words}; describe the start in words it knows."
            )
        shape = prior.latent_shape(self.size, self.size)
        noise = [torch.randn(shape, generator=self._rng(f"canvas/start/{particle}")) for particle in range(count)]
        view = None if self._view is None else self._view.to(device)
        conditions = CFGConditions(prior.embed([prompt], view), prior.embed([""], view))
        together = max(1, _SAMPLED_TOGETHER // prior.views) * prior.views
        return torch.cat(
            [
                denoise(
                    prior, part.to(device), 1.0, conditions, steps=self.config.init_steps, scale=self.config.init_scale
                )
                for part in torch.stack(noise).split(together)
            ]
        )

    def _as_latents(self, values: Tensor, prior: Prior, generator: torch.Generator | None) -> Tensor:
        return values if self.config.parametrisation == "latents" else prior.encode(values, generator)


def load_image(path: str | Path, size: int) -> Tensor:
    """(size, size, 3) in [0, 1]: the centre square of an image file; transparent parts over white.

    Raises:
        ValueError: The file does not exist or is no image.
    """
    path = Path(path)
    try:
        with Image.open(path) as file:
            rgba = file.convert("RGBA")
    except FileNotFoundError:
        raise FieldError(f"there is no file {path} (relative paths start at {Path.cwd()})", "init_image") from None
    except (UnidentifiedImageError, OSError) as error:
        raise FieldError(f"{path} cannot be read as an image ({error})", "init_image") from None
    white = Image.new("RGBA", rgba.size, "white")
    image = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), dtype=np.float32) / 255.0
    side = min(image.shape[:2])
    top, left = ((extent - side) // 2 for extent in image.shape[:2])
    return _scaled(torch.from_numpy(image[None, top : top + side, left : left + side]), size)[0]


def _scaled(images: Tensor, size: int) -> Tensor:
    """(B, size, size, 3) of square (B, H, H, 3)."""
    if images.shape[1] == size:
        return images
    scaled = functional.interpolate(
        images.movedim(-1, 1), (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return scaled.movedim(1, -1)


def _stop_waiting(canvas: Any, _: Any) -> None:
    canvas._waiting = False
