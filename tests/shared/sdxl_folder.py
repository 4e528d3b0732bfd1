"""A tiny, randomly initialised folder in the layout of Stable Diffusion XL, built in code."""

from __future__ import annotations

from pathlib import Path

from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from shared.toy_parts import seeded, spread, write_clip, write_index, write_vae

WIDTHS = (8, 16)
SIDE = 8


def build_sdxl(folder: Path) -> Path:
    """The parts of a StableDiffusionXLPipeline with images of 16 x 16 pixels."""
    with seeded():
        first = write_clip(folder, "", width=WIDTHS[0], projected=False)
        second = write_clip(folder, "_2", width=WIDTHS[1], projected=True, pad="!")
        vae = write_vae(folder, channels=4, scaling_factor=0.13025, force_upcast=True)
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
            cross_attention_dim=sum(WIDTHS),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTHS[1],
        )
        spread(unet).save_pretrained(folder / "unet")
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    ).save_pretrained(folder / "scheduler")
    tokenizer = ["transformers", "CLIPTokenizer"]
    return write_index(
        folder,
        "StableDiffusionXLPipeline",
        force_zeros_for_empty_prompt=True,
        scheduler=["diffusers", "EulerDiscreteScheduler"],
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=["diffusers", "UNet2DConditionModel"],
        vae=vae,
    )
