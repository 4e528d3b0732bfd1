"""A tiny, randomly initialised folder in the layout of the embedded flow prior, a miniature of Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from prior_training.flow_models import FlowSizes, build_clip, build_transformer, save_flow_prior
from torch import nn

from scoredist3d.procedural import build_tokenizer

SIZES = FlowSizes.miniature()
CHANNELS, FACTOR, SIDE = 16, 8, 8
"""Latent channels, pixels per latent pixel and latent pixels per side: images of 64 x 64 pixels."""


def build_vae(channels: int = CHANNELS) -> AutoencoderKL:
    """An f8 autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=FACTOR * SIDE,
        scaling_factor=1.5,
        shift_factor=0.06,
        mid_block_add_attention=False,
    )


def build_flow(folder: Path) -> Path:
    """The folder, in float32; the weights are larger than initial ones so that every condition has an effect."""
    with torch.random.fork_rng(devices=[]):  # library modules draw their first weights from the global stream
        torch.manual_seed(0)
        tokenizer = build_tokenizer(folder / "made")
        transformer = build_transformer(SIZES, CHANNELS, SIDE)
        text_encoders = (build_clip(SIZES, tokenizer), build_clip(SIZES, tokenizer))
        networks: tuple[nn.Module, ...] = (transformer, *text_encoders)
        for network in networks:
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        save_flow_prior(
            folder / "flow",
            vae=build_vae(),
            transformer=transformer,
            text_encoders=text_encoders,
            tokenizer=folder / "made",
            shift=SIZES.shift,
            dtype=torch.float32,
        )
    return folder / "flow"
