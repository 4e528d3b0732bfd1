"""A tiny, randomly initialised folder in the layout of Qwen-Image, built in code."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from shared.toy_parts import seeded, spread, write_index, write_qwen_tokenizer

CHANNELS, SIDE, TEXT_WIDTH = 16, 4, 16


def build_qwen_image(folder: Path) -> Path:
    """The parts of a QwenImagePipeline; use it with images of 32 x 32 pixels."""
    tokens = write_qwen_tokenizer(folder / "tokenizer")
    with seeded():
        model = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokens),
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "max_window_layers": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
                "bos_token_id": tokens["<|endoftext|>"],
                "eos_token_id": tokens["<|im_end|>"],
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": TEXT_WIDTH,
                "fullatt_block_indexes": [0],
            },
        )
        spread(Qwen2_5_VLForConditionalGeneration(model)).save_pretrained(folder / "text_encoder")
        AutoencoderKLQwenImage(base_dim=4, z_dim=CHANNELS, num_res_blocks=1).save_pretrained(folder / "vae")
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        spread(transformer).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    ).save_pretrained(folder / "scheduler")
    return write_index(
        folder,
        "QwenImagePipeline",
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=["transformers", "Qwen2_5_VLForConditionalGeneration"],
        tokenizer=["transformers", "Qwen2Tokenizer"],
        transformer=["diffusers", "QwenImageTransformer2DModel"],
        vae=["diffusers", "AutoencoderKLQwenImage"],
    )
