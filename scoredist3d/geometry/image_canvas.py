"""A stack of independent images as the representation, for comparing methods without a renderer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, FieldError, option
from scoredist3d.diffusion.samplers import denoise
from scoredist3d.limits import MAX_BATCH
from scoredist3d.meshes.image_files import decode_image
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

_log = logging.getLogger(__name__)

_SAMPLING_BATCH = 8  # images sampled at once; bounds the memory


@register("geometry", "image-canvas", summary="N independent images, as pixels or latents, for text-to-2d.")
class ImageCanvas(nn.Module):
    """``N`` images (particles) that are optimized independently.

    With ``parametrisation: pixels`` the parameters are display values around [0, 1] without an activation (the identity
    renderer of the score distillation literature). With ``latents`` they are the denoiser's inputs, so that neither
    the encoder nor the decoder is used during training.

    The particles are initialized as noise, from an image file, or as samples of the prior. The latter two need the
    prior on its device and are therefore computed on first access; a loaded state is not initialized again. Equal
    config, prior, view and ``rng`` give equal initial images.

    Attributes:
        values: (N, C, h, w) latents or (N, H, W, 3) pixels.
        start: Copy of the initial values, saved with the state; None without ``keep_start``.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of the canvas."""

        parametrisation: Literal["pixels", "latents"] = option("latents", "Representation of the optimized images.")
        particles: int = option(4, "Number of images.", ge=1, le=MAX_BATCH)
        size: int | None = option(None, "Width and height in pixels; null uses the prior's image size.", ge=8, le=4096)
        initial_std: float = option(
            1.0,
            "Standard deviation of the initial latents; pixels start around gray with half this standard deviation.",
            ge=0,
        )
        init_image: str | None = option(
            None,
            "Image file (PNG, JPEG, ...) that initializes every particle; center-cropped and scaled to the canvas.",
            file=True,
        )
        init_prompt: str | None = option(
            None,
            "Prompt for samples of the prior that initialize the particles; an empty prompt samples unconditionally.",
        )
        init_steps: int = option(25, "Number of denoising steps for the samples of init_prompt.", ge=1)
        init_scale: float = option(5.0, "Guidance scale for the samples of init_prompt.")

        def validate(self) -> list[str]:
            """Allow at most one kind of initialization."""
            if self.init_image is not None and self.init_prompt is not None:
                return ["init_image: cannot be combined with init_prompt; remove one of them"]
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
        prior: Prior that determines the sizes of images and latents, and encodes or samples the initial images.
        rng: Random streams for the initial values; equal on all ranks.
        view: One camera, on which the samples of ``init_prompt`` are conditioned.
        keep_start: Whether to keep a copy of the initial values, for editing methods.
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
        self._uninitialized = self.starts_from_images
        self.register_load_state_dict_post_hook(_mark_initialized)

    @property
    def starts_from_images(self) -> bool:
        """Whether the particles are initialized from images rather than from noise."""
        return self.config.init_image is not None or self.config.init_prompt is not None

    def latents(self, prior: Prior, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w) latents of the particles ``index`` (B,), differentiable; pixels are encoded by the prior."""
        self.begin(prior)
        return self._as_latents(self.values[index], prior, generator)

    def pixels(self, prior: Prior, index: Tensor) -> Tensor | None:
        """(B, H, W, 3) pixels of the particles ``index`` (B,), differentiable; None if latents are optimized."""
        self.begin(prior)
        return self.values[index] if self.config.parametrisation == "pixels" else None

    @torch.no_grad()
    def source(self, prior: Prior, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w) initial latents of the particles ``index`` (B,).

        Raises:
            ValueError: The canvas was constructed without ``keep_start``.
        """
        self.begin(prior)
        if self.start is None:
            raise ValueError("the canvas has no copy of its initial values; construct it with keep_start=True")
        return self._as_latents(self.start[index], prior, generator)

    @torch.no_grad()
    def images(self, prior: Prior) -> Tensor:
        """(N, H, W, 3) images in [0, 1]; latents are decoded by the prior."""
        self.begin(prior)
        values = prior.decode(self.values) if self.config.parametrisation == "latents" else self.values
        return values.clamp(0.0, 1.0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A single parameter group, ``canvas``."""
        return [{"name": "canvas", "params": [self.values]}]

    @torch.no_grad()
    def begin(self, prior: Prior) -> None:
        """Compute the initial images if they come from a file or the prior and have not been computed yet.

        Raises:
            ValueError: The file cannot be read, or the initial latents do not have the size of the canvas.
        """
        if not self._uninitialized:
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
                f"this prior encodes images of {prior.image_size} pixels, so latents of size "
                f"{self.size} cannot be initialized from an image; set geometry.size={prior.image_size}",
                "size",
            )
        self.values.copy_(values.expand(particles, *values.shape[1:]))
        if self.start is not None:
            self.start.copy_(self.values)
        self._uninitialized = False

    def _sampled(self, prior: Prior, prompt: str) -> Tensor:
        """(N, C, h, w) deterministic samples of the prior; the noise of particle i depends on the seed and i."""
        count, device = self.config.particles, self.values.device
        unknown = prior.unknown_words(prompt)
        if unknown:
            words = ", ".join(repr(word) for word in unknown)
            _log.warning(
                f"geometry.init_prompt: the prior's vocabulary lacks {words}; describe the image with other words."
            )
        shape = prior.latent_shape(self.size, self.size)
        noise = [torch.randn(shape, generator=self._rng(f"canvas/start/{particle}")) for particle in range(count)]
        view = None if self._view is None else self._view.to(device)
        conditions = CFGConditions(prior.embed([prompt], view), prior.embed([""], view))
        together = max(1, _SAMPLING_BATCH // prior.views) * prior.views
        return torch.cat(
            [
                denoise(
                    prior, part.to(device), 1.0, conditions, steps=self.config.init_steps, scale=self.config.init_scale
                )
                for part in torch.stack(noise).split(together)
            ]
        )

    def _as_latents(self, values: Tensor, prior: Prior, generator: torch.Generator | None) -> Tensor:
        """(B, C, h, w) latents of parameters in the canvas's parametrization."""
        return values if self.config.parametrisation == "latents" else prior.encode(values, generator)


def load_image(path: str | Path, size: int) -> Tensor:
    """(size, size, 3) in [0, 1], the central square of an image file; transparent parts are composited over white.

    Raises:
        ValueError: The file does not exist or is not an image.
    """
    path = Path(path)
    try:
        rgba = decode_image(path, "RGBA")
    except FileNotFoundError:
        raise FieldError(
            f"there is no file {path}; relative paths are resolved from {Path.cwd()}", "init_image"
        ) from None
    except (ValueError, OSError) as error:
        raise FieldError(f"{path} cannot be read as an image ({error}); use a PNG or JPEG file", "init_image") from None
    white = Image.new("RGBA", rgba.size, "white")
    image = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"), dtype=np.float32) / 255.0
    side = min(image.shape[:2])
    top, left = ((extent - side) // 2 for extent in image.shape[:2])
    return _scaled(torch.from_numpy(image[None, top : top + side, left : left + side]), size)[0]


def _scaled(images: Tensor, size: int) -> Tensor:
    """(B, size, size, 3) images, scaled from square images (B, H, H, 3)."""
    if images.shape[1] == size:
        return images
    scaled = functional.interpolate(
        images.movedim(-1, 1), (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return scaled.movedim(1, -1)


def _mark_initialized(canvas: Any, _: Any) -> None:
    """Mark the canvas as initialized after loading a state, so that the loaded values are kept."""
    canvas._uninitialized = False
