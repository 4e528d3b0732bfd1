"""Tiny, randomly initialised folders in the layouts of FLUX.2 dev and FLUX.2 klein, built in code."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.toy_parts import seeded, spread, write_index, write_qwen_tokenizer

CHANNELS, FACTOR, SIDE, TEXT_WIDTH = 4, 4, 4, 8
"""Channels of the autoencoder, pixels and number of latent pixels per side, width of one layer of the text encoder."""
_SPECIAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "<pad>")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}"
    "{% for block in message.content %}{{ block.text }}{% endfor %}"
    "{% if message.role == 'system' %}[/SYSTEM_PROMPT]{% else %}[/INST]{% endif %}{% endfor %}"
)


def write_mistral_tokenizer(folder: Path) -> int:
    """Write a tokenizer in the layout of Mistral's processor that knows single bytes; returns the number of tokens."""
    tokens = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", model_max_length=4096, **named)
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    return len(tokens)


def write_mistral(folder: Path) -> None:
    """Write a vision-language model with a layer more than the deepest one that the pipeline reads."""
    size = {"hidden_size": TEXT_WIDTH, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4}
    model = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": write_mistral_tokenizer(folder / "tokenizer"),
            "num_hidden_layers": 31,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            **size,
        },
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, **size},
        spatial_merge_size=1,
    )
    spread(Mistral3ForConditionalGeneration(model)).save_pretrained(folder / "text_encoder")


def write_qwen3(folder: Path) -> None:
    """Write a language model with a layer more than the deepest one that the pipeline reads."""
    tokens = write_qwen_tokenizer(folder / "tokenizer")
    model = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=TEXT_WIDTH,
        intermediate_size=8,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=1024,
    )
    spread(Qwen3ForCausalLM(model)).save_pretrained(folder / "text_encoder")


def write_patch_vae(folder: Path) -> None:
    """Write an autoencoder that halves the size, with statistics of its patches."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=16,
    )
    channels = torch.arange(4.0 * CHANNELS)
    vae.bn.running_mean.copy_(0.1 * channels - 0.5)
    vae.bn.running_var.copy_(0.5 + 0.2 * channels)
    vae.save_pretrained(folder / "vae")


def build_flux_2(folder: Path, *, klein: bool = False) -> Path:
    """The parts of a Flux2Pipeline or Flux2KleinPipeline; use it with images of 16 x 16 pixels."""
    with seeded():
        write_qwen3(folder) if klein else write_mistral(folder)
        write_patch_vae(folder)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=3 * TEXT_WIDTH,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=not klein,
        )
        spread(transformer).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    ).save_pretrained(folder / "scheduler")
    return write_index(
        folder,
        "Flux2KleinPipeline" if klein else "Flux2Pipeline",
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=["transformers", "Qwen3ForCausalLM" if klein else "Mistral3ForConditionalGeneration"],
        tokenizer=["transformers", "Qwen2TokenizerFast" if klein else "PixtralProcessor"],
        transformer=["diffusers", "Flux2Transformer2DModel"],
        vae=["diffusers", "AutoencoderKLFlux2"],
        **({"is_distilled": False} if klein else {}),
    )
