"""A tiny, randomly initialised folder in the layout of Sana, built in code."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from shared.toy_parts import byte_tokens, seeded, spread, write_index

CHANNELS, SIDE, FACTOR, TEXT_WIDTH = 8, 4, 4, 16
SHIFT = 3.0


def write_gemma_tokenizer(folder: Path) -> int:
    """Write a Gemma tokenizer that knows single letters and bytes; returns the number of its tokens."""
    ids = byte_tokens("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    GemmaTokenizer(vocab=ids, merges=[], add_bos_token=True, model_max_length=4096).save_pretrained(folder)
    return len(ids)


def build_sana(folder: Path) -> Path:
    """The parts of a SanaPipeline; use it with images of 16 x 16 pixels, for which the pipeline needs other checks."""
    count = write_gemma_tokenizer(folder / "tokenizer")
    with seeded():
        language_model = Gemma2Config(
            vocab_size=count,
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=4096,
        )
        spread(Gemma2Model(language_model)).save_pretrained(folder / "text_encoder")
        vae = AutoencoderDC(
            latent_channels=CHANNELS,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41407,
        )
        vae.save_pretrained(folder / "vae")
        transformer = SanaTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_WIDTH,
            sample_size=SIDE,
        )
        spread(transformer).save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, timestep_spacing="linspace"
    ).save_pretrained(folder / "scheduler")
    return write_index(
        folder,
        "SanaPipeline",
        scheduler=["diffusers", "DPMSolverMultistepScheduler"],
        text_encoder=["transformers", "Gemma2Model"],
        tokenizer=["transformers", "GemmaTokenizerFast"],
        transformer=["diffusers", "SanaTransformer2DModel"],
        vae=["diffusers", "AutoencoderDC"],
    )
