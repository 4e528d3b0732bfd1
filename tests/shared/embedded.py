"""Sizes of the embedded prior, read from its configuration, so that no test states them as numbers."""

from __future__ import annotations

import json
from typing import Any

from scoredist3d.priors.model_files import EMBEDDED_FOLDER


def config_of(part: str) -> dict[str, Any]:
    """The configuration of a network of the embedded prior, e.g. ``vae``."""
    config: dict[str, Any] = json.loads((EMBEDDED_FOLDER / part / "config.json").read_text())
    return config


LATENT_CHANNELS: int = config_of("unet")["in_channels"]
LATENT_SIZE: int = config_of("unet")["sample_size"]
FACTOR: int = 2 ** (len(config_of("vae")["block_out_channels"]) - 1)
"""Side of the block of pixels that one latent pixel represents."""
IMAGE_SIZE: int = LATENT_SIZE * FACTOR
LATENT_SHAPE: tuple[int, int, int] = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
HALF: dict[str, int] = {"image_size": IMAGE_SIZE // 2}
"""Options of a prior that process images and latents of half the size, for speed."""
