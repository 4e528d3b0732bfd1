"""Options of a prior that are inputs of the denoisers of single families."""

from __future__ import annotations

from dataclasses import dataclass, fields

from scoredist3d.config import ComponentConfig, option


@dataclass
class ModelOptions(ComponentConfig):
    """Inputs that only some families have; None selects the value of the family's own diffusers pipeline."""

    original_size: tuple[int, int] | None = option(
        None,
        "Stable Diffusion XL: height and width of the image before it was resized for training, in pixels; null is the "
        "size of the render.",
        ge=1,
        le=16384,
    )
    crop_top_left: tuple[int, int] | None = option(
        None,
        "Stable Diffusion XL: top and left margin that was cropped for training, in pixels; null is [0, 0].",
        ge=0,
        le=16384,
    )
    target_size: tuple[int, int] | None = option(
        None,
        "Stable Diffusion XL: height and width of the image after cropping, in pixels; null is the size of the render.",
        ge=1,
        le=16384,
    )
    noise_level: int | None = option(
        None,
        "DeepFloyd IF, stage II: timestep, of 1000, of the noise in the low-resolution image; null is 250.",
        ge=0,
        le=999,
    )
    distilled_guidance: float | None = option(
        None,
        "FLUX.1 dev and FLUX.2 dev: guidance scale that is an input of the network, which was distilled from a model "
        "with guidance; null is 3.5 and 4.",
        ge=0,
        le=1000,
    )

    def given(self) -> list[str]:
        """Names of the options of this class that are not None."""
        return [field.name for field in fields(ModelOptions) if getattr(self, field.name) is not None]
