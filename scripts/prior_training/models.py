"""Networks of the embedded prior, in diffusers format.

Their sizes are chosen for two CPU cores: one prediction of four views with classifier-free guidance takes about 70 ms.
The whole folder has at most 16 MiB.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from scoredist3d.procedural import lexicon
from scoredist3d.procedural.attributes import FAMILIES
from scoredist3d.procedural.captions import GENERIC_NOUNS, adjectives
from scoredist3d.procedural.related import related_words

from .cameras import REFERENCE_EXTENT

IMAGE_SIZE = 128
LATENT_STD = 0.22
"""Standard deviation to which latents are scaled.

Stable Diffusion's latents have 1. A smaller value lowers the signal-to-noise ratio of every timestep, here by 13 dB, so
that text has an effect on a larger part of the time axis of the standard schedule. The coarse structure of an image is
repeated in many of the 32 channels; with a larger value it would be visible through the noise of most timesteps."""


@dataclass(frozen=True)
class PriorSizes:
    """Sizes of the networks; the defaults are those of the embedded prior."""

    unet_channels: tuple[int, ...] = (96, 128)
    unet_heads: tuple[int, ...] = (3, 4)
    vae_channels: tuple[int, ...] = (16, 32, 64, 88)
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    norm_groups: int = 16
    image_size: int = IMAGE_SIZE
    latent_channels: int = 32

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // 2 ** (len(self.vae_channels) - 1)

    @classmethod
    def miniature(cls) -> PriorSizes:
        """Sizes for tests, which train in seconds."""
        return cls(
            unet_channels=(16, 32),
            unet_heads=(1, 2),
            vae_channels=(8, 8, 8, 16),
            text_width=32,
            text_layers=1,
            text_heads=2,
            norm_groups=8,
            image_size=64,
            latent_channels=8,
        )


def build_vae(sizes: PriorSizes) -> AutoencoderKL:
    """Autoencoder with 8x spatial reduction."""
    stages = len(sizes.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        sample_size=sizes.image_size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] after the autoencoder, which may leave this range."""
    output: Tensor = vae.decode(vae.encode(2.0 * images - 1.0).latent_dist.mean).sample.float()
    return 0.5 * (output + 1.0)


def build_unet(sizes: PriorSizes) -> UNet2DConditionModel:
    """Denoiser with text as cross attention; the flattened 4x4 camera-to-world matrix adds to the time embedding."""
    stages = len(sizes.unet_channels)
    return UNet2DConditionModel(
        sample_size=sizes.latent_size,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * stages,
        up_block_types=("CrossAttnUpBlock2D",) * stages,
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.unet_heads,
        norm_num_groups=sizes.norm_groups,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    )


def clip_config(tokenizer: Any, *, width: int, layers: int, heads: int, intermediate: int) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder for the tokens of a tokenizer; its projection has the same width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(sizes: PriorSizes, tokenizer: Any) -> CLIPTextModel:
    """Text encoder trained jointly with the denoiser."""
    width = sizes.text_width
    return CLIPTextModel(
        clip_config(tokenizer, width=width, layers=sizes.text_layers, heads=sizes.text_heads, intermediate=3 * width)
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, with prediction of the clean latents.

    At most timesteps, the latents (standard deviation ``LATENT_STD``) are much weaker than the noise. The U-Net has
    only three times as many channels as the latents, so a v-prediction would spend most of its last layers on copying
    the noise (compare arXiv 2511.13720).
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        rescale_betas_zero_snr=False,
    )


def vocabulary(*, lettered: bool = False) -> dict[str, Any]:
    """The content of ``vocabulary.json``: the words of the captions, their nouns, and the order of their adjectives.

    Args:
        lettered: Whether the prior was also trained on signs and mugs with words.
    """
    nouns = {family.name: list(family.synonyms) for family in FAMILIES}
    content: dict[str, Any] = {"words": list(lexicon()), "nouns": nouns, "generic_nouns": list(GENERIC_NOUNS)}
    content["related"] = related_words(nouns)
    content["adjectives"] = adjectives()
    if lettered:
        content["words"] += [letter for letter in ascii_lowercase if letter not in content["words"]]
        content |= {"nouns": nouns | {"sign": []}, "spells_quotes": True}
    return content


def save_networks(folder: Path, networks: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write networks to the subfolders of their names as safetensors, converted to ``dtype`` in place.

    The path from which a network was loaded is left out of its configuration.
    """
    for name, network in networks.items():
        network.to(dtype).save_pretrained(folder / name, safe_serialization=True)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def save_prior(folder: Path, networks: Mapping[str, Any], *, tokenizer: Path) -> None:
    """Write a diffusers folder in fp16, with a copy of the tokenizer's folder and the vocabulary of captions.

    Args:
        folder: Target folder; networks that are not given keep their files in it.
        networks: Trained networks by part: ``vae``, ``unet``, ``text_encoder``.
        tokenizer: Folder of the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_networks(folder, networks, torch.float16)
    build_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=1) + "\n")
    (folder / "camera.json").write_text(json.dumps({"reference_extent": REFERENCE_EXTENT}) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
