"""A tiny, randomly initialised folder in the layout of Z-Image, built in code."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from shared.toy_parts import seeded, spread, write_flux_vae, write_index, write_qwen_tokenizer

CHANNELS, SIDE, TEXT_WIDTH = 16, 8, 16


def build_z_image(folder: Path) -> Path:
    """The parts of a ZImagePipeline; use it with images of 16 x 16 pixels."""
    tokens = write_qwen_tokenizer(folder / "tokenizer")
    with seeded():
        language_model = Qwen3Config(
            vocab_size=len(tokens),
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
        )
        spread(Qwen3Model(language_model)).save_pretrained(folder / "text_encoder")
        vae = write_flux_vae(folder, CHANNELS)
        transformer = ZImageTransformer2DModel(
            in_channels=CHANNELS,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )
        spread(transformer).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return write_index(
        folder,
        "ZImagePipeline",
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=["transformers", "Qwen3Model"],
        tokenizer=["transformers", "Qwen2Tokenizer"],
        transformer=["diffusers", "ZImageTransformer2DModel"],
        vae=vae,
    )
