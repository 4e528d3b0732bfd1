"""Parts of tiny, randomly initialised pipelines in the layouts that are published for the families of priors.

The tokenizers are built with the classes of the published ones, on small vocabularies: CLIP's byte pairs and T5's
unigrams of the ``tokenizers`` library. The published vocabularies are not exercised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, Qwen2Tokenizer

from shared.deepfloyd_folder import build_t5

WORDS = ("a", "red", "blue", "mug", "chair", "front", "view")
CLIP_TOKENS = 12


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed the global stream, from which library modules draw their first weights; restore it at exit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def spread(network: nn.Module) -> nn.Module:
    """The network with larger weights than initial ones, none of them zero, so that every input has an effect."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


def write_clip_tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> int:
    """Write a CLIP tokenizer that knows :data:`WORDS` and their letters; returns the number of its tokens."""
    letters = sorted(set("".join(WORDS)) | set("xyz,"))
    vocabulary = ["!", *letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # the last ones, as in CLIP, whose pooling takes the largest id
    ids = {token: index for index, token in enumerate(vocabulary)}
    CLIPTokenizer(vocab=ids, merges=merges, model_max_length=CLIP_TOKENS, pad_token=pad).save_pretrained(folder)
    return len(vocabulary)


def write_clip(folder: Path, suffix: str, *, width: int, projected: bool, pad: str = "<|endoftext|>") -> list[str]:
    """Write a CLIP text encoder and its tokenizer; returns the encoder's entry of the index."""
    count = write_clip_tokenizer(folder / f"tokenizer{suffix}", pad=pad)
    config = CLIPTextConfig(
        vocab_size=count,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=count - 2,
        eos_token_id=count - 1,
        pad_token_id=count - 1,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    spread(kind(config)).save_pretrained(folder / f"text_encoder{suffix}")
    return ["transformers", kind.__name__]


def write_t5(folder: Path, suffix: str = "") -> list[str]:
    """Write a T5 encoder and a tokenizer that knows single letters; returns the encoder's entry of the index."""
    build_t5(folder / "t5")
    for part in ("tokenizer", "text_encoder"):
        (folder / "t5" / part).rename(folder / f"{part}{suffix}")
    (folder / "t5").rmdir()
    return ["transformers", "T5EncoderModel"]


def write_qwen_tokenizer(folder: Path) -> dict[str, int]:
    """Write a Qwen2 tokenizer that knows single bytes, with the chat template of one message; returns its tokens."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=ids, merges=[], model_max_length=4096, extra_special_tokens=list(special[1:]))
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return ids


def byte_tokens(*special: str) -> dict[str, int]:
    """Numbers of the tokens of a tokenizer in SentencePiece's manner that knows single letters and bytes."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ▁,."
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    return {token: index for index, token in enumerate(tokens)}


def write_vae(folder: Path, *, channels: int, **config: Any) -> list[str]:
    """Write an autoencoder that halves the size; returns its entry of the index."""
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    ).save_pretrained(folder / "vae")
    return ["diffusers", "AutoencoderKL"]


def write_flux_vae(folder: Path, channels: int) -> list[str]:
    """Write an autoencoder with the scale and shift of FLUX.1; returns its entry of the index."""
    return write_vae(
        folder,
        channels=channels,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def write_index(folder: Path, pipeline: str, **entries: Any) -> Path:
    """Write ``model_index.json``; returns the folder."""
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.1"} | entries
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
