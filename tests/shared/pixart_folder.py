"""A tiny, randomly initialised folder in the layout of PixArt-Sigma, built in code."""

from __future__ import annotations

from pathlib import Path

from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from shared.deepfloyd_folder import TEXT_WIDTH
from shared.toy_parts import seeded, spread, write_index, write_t5, write_vae

SIDE = 8


def build_pixart(folder: Path) -> Path:
    """The parts of a PixArtSigmaPipeline with images of 16 x 16 pixels."""
    with seeded():
        encoder = write_t5(folder)
        vae = write_vae(folder, channels=4, scaling_factor=0.13025)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=SIDE,
            patch_size=2,
            caption_channels=TEXT_WIDTH,
            use_additional_conditions=False,
        )
        spread(transformer).save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear").save_pretrained(
        folder / "scheduler"
    )
    return write_index(
        folder,
        "PixArtSigmaPipeline",
        scheduler=["diffusers", "DPMSolverMultistepScheduler"],
        text_encoder=encoder,
        tokenizer=["transformers", "T5Tokenizer"],
        transformer=["diffusers", "PixArtTransformer2DModel"],
        vae=vae,
    )
