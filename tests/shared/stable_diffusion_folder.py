"""A tiny, randomly initialised pipeline folder in the layout of Stable Diffusion."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ["a", "red", "blue", "mug", "chair", "front", "view"]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def build_tokenizer(folder: Path) -> int:
    """Save a tokenizer of a few words; returns the number of its tokens."""
    letters = sorted(set("".join(WORDS)) | set("xyz,"))
    vocab = [*SPECIAL, *letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in vocab:
                vocab.append(parts[0])
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocab)}, merges=merges, model_max_length=8
    )
    tokenizer.save_pretrained(folder)
    return len(vocab)


def build_folder(folder: Path, *, camera: bool, vae: str | None, out_channels: int | None = None) -> Path:
    """The folder; without ``vae`` (kl or tiny), it is a pixel-space model."""
    with torch.random.fork_rng(devices=[]):  # library modules draw their first weights from the global stream
        torch.manual_seed(0)
        return _build_folder(folder, camera, vae, out_channels)


def _build_folder(folder: Path, camera: bool, vae: str | None, out_channels: int | None) -> Path:
    size = build_tokenizer(folder / "tokenizer")
    channels = 3 if vae is None else 4
    embedding = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16} if camera else {}
    UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out_channels or channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **embedding,
    ).save_pretrained(folder / "unet")
    text = CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    if vae == "kl":
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.5,
        ).save_pretrained(folder / "vae")
    elif vae == "tiny":
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        ).save_pretrained(folder / "vae")
    if vae is not None:
        index["vae"] = ["diffusers", "AutoencoderKL" if vae == "kl" else "AutoencoderTiny"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vocabulary.json").write_text(json.dumps(WORDS))
    return folder
