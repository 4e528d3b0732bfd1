"""A tiny, randomly initialised folder in the layout of AuraFlow, built in code."""

from __future__ import annotations

from pathlib import Path

from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import LlamaTokenizer, UMT5Config, UMT5EncoderModel

from shared.toy_parts import byte_tokens, seeded, spread, write_index, write_vae

CHANNELS, SIDE, TEXT_WIDTH = 4, 8, 16
SHIFT = 1.73
LARGEST = 256
"""Number of positions on each side for which the transformer has embeddings."""


def write_llama_tokenizer(folder: Path) -> int:
    """Write a Llama tokenizer that knows single letters and bytes; returns the number of its tokens."""
    ids = byte_tokens("<unk>", "<s>", "</s>", "<pad>")
    tokenizer = LlamaTokenizer(
        vocab=ids, merges=[], add_bos_token=False, add_eos_token=True, pad_token="<pad>", padding_side="right"
    )
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return len(ids)


def build_aura_flow(folder: Path) -> Path:
    """The parts of an AuraFlowPipeline; use it with images of 16 x 16 pixels."""
    count = write_llama_tokenizer(folder / "tokenizer")
    with seeded():
        encoder = UMT5Config(
            vocab_size=count,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
        spread(UMT5EncoderModel(encoder)).save_pretrained(folder / "text_encoder")
        vae = write_vae(folder, channels=CHANNELS, scaling_factor=0.13025, force_upcast=True)
        transformer = AuraFlowTransformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=CHANNELS,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=16,
            out_channels=CHANNELS,
            pos_embed_max_size=LARGEST**2,
        )
        spread(transformer).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    return write_index(
        folder,
        "AuraFlowPipeline",
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=["transformers", "UMT5EncoderModel"],
        tokenizer=["transformers", "LlamaTokenizerFast"],
        transformer=["diffusers", "AuraFlowTransformer2DModel"],
        vae=vae,
    )
