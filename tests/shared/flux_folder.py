"""Tiny, randomly initialised folders in the layout of FLUX.1, built in code."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from shared.deepfloyd_folder import TEXT_WIDTH
from shared.toy_parts import seeded, spread, write_clip, write_flux_vae, write_index, write_t5

CHANNELS, SIDE = 16, 8
POOLED_WIDTH = 16


def build_flux(folder: Path, *, distilled: bool = True) -> Path:
    """The parts of a FluxPipeline with images of 16 x 16 pixels: dev with distilled guidance, otherwise schnell."""
    with seeded():
        clip = write_clip(folder, "", width=POOLED_WIDTH, projected=False)
        t5 = write_t5(folder, "_2")
        vae = write_flux_vae(folder, CHANNELS)
        transformer = FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            guidance_embeds=distilled,
            axes_dims_rope=(2, 2, 4),
        )
        spread(transformer).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(
        shift=3.0 if distilled else 1.0,
        use_dynamic_shifting=distilled,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    ).save_pretrained(folder / "scheduler")
    return write_index(
        folder,
        "FluxPipeline",
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=["transformers", "CLIPTokenizer"],
        tokenizer_2=["transformers", "T5Tokenizer"],
        transformer=["diffusers", "FluxTransformer2DModel"],
        vae=vae,
    )
