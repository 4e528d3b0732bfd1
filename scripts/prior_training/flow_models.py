"""Networks of the embedded flow prior: a miniature of Stable Diffusion 3 in its published diffusers layout.

The T5 encoder is left out, as it may be in the published model. The camera is one more context token; see
:mod:`scoredist3d.priors.stable_diffusion_3`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextModelWithProjection

from scoredist3d.priors.stable_diffusion_3 import CAMERA_TOKEN, T5_LENGTH

from .cameras import REFERENCE_EXTENT
from .models import clip_config, save_networks, vocabulary


@dataclass(frozen=True)
class FlowSizes:
    """Sizes of the networks; the defaults are those of the embedded flow prior.

    Attributes:
        layers: Number of joint transformer blocks.
        heads: Number of attention heads.
        head_width: Width of a head; the inner width is ``heads`` times this.
        patch_size: Side in latent pixels of the square that is one image token.
        text_width: Width of each text encoder.
        text_layers: Number of layers of each text encoder. Context tokens are the output of the last layer but one.
        text_heads: Number of attention heads of each text encoder.
        shift: Timestep shift of training and sampling. With 5, most timesteps of the training have a signal-to-noise
            ratio between -25 and -5 dB.
    """

    layers: int = 6
    heads: int = 6
    head_width: int = 16
    patch_size: int = 1
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 4
    shift: float = 5.0

    @classmethod
    def miniature(cls) -> FlowSizes:
        """Sizes for tests, which train in seconds."""
        return cls(layers=2, heads=2, head_width=8, patch_size=2, text_width=16, text_heads=2)


def build_transformer(sizes: FlowSizes, latent_channels: int, latent_size: int) -> SD3Transformer2DModel:
    """The denoiser, with diffusers' own initial weights."""
    width = sizes.heads * sizes.head_width
    return SD3Transformer2DModel(
        sample_size=latent_size,
        patch_size=sizes.patch_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=sizes.layers,
        attention_head_dim=sizes.head_width,
        num_attention_heads=sizes.heads,
        joint_attention_dim=2 * sizes.text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * sizes.text_width,
        pos_embed_max_size=3 * latent_size // (2 * sizes.patch_size),  # wide images have up to 1.5 times the side
        qk_norm="rms_norm",
    )


def zero_modulation(transformer: SD3Transformer2DModel) -> None:
    """Set the modulation of all blocks and the output to zero (adaLN-Zero, arXiv 2212.09748), for training."""
    layers: list[Any] = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        layers += [block.norm1.linear, block.norm1_context.linear]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def build_clip(sizes: FlowSizes, tokenizer: Any) -> CLIPTextModelWithProjection:
    """One of the two text encoders, which are trained jointly with the denoiser."""
    width = sizes.text_width
    return CLIPTextModelWithProjection(
        clip_config(tokenizer, width=width, layers=sizes.text_layers, heads=sizes.text_heads, intermediate=4 * width)
    )


def save_flow_prior(
    folder: Path,
    *,
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    tokenizer: Path,
    shift: float,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a folder of StableDiffusion3Pipeline with copies of the tokenizer's folder and the vocabulary of captions.

    The networks are converted to ``dtype`` in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    networks = {"vae": vae, "transformer": transformer}
    networks |= dict(zip(("text_encoder", "text_encoder_2"), text_encoders, strict=True))
    save_networks(folder, networks, dtype)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizer, folder / name, dirs_exist_ok=True)
    text_encoder = ["transformers", "CLIPTextModelWithProjection"]
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.42.1",
        CAMERA_TOKEN: True,
        T5_LENGTH: 0,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder,
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "camera.json").write_text(json.dumps({"reference_extent": REFERENCE_EXTENT}) + "\n")
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary(lettered=True), indent=1) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
