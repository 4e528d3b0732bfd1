"""Text encoding of a diffusers pipeline: prompts to the hidden states that its UNet attends to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger("scoredist3d")

_T5_LENGTH = 77
"""Tokens per prompt with which DeepFloyd IF was trained; T5 itself has no limit."""


def encode_text(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
    """The text encoder's last hidden state, computed as the model's own diffusers pipeline does it.

    A CLIP encoder sees padding unless its configuration sets ``use_attention_mask``, as in StableDiffusionPipeline.
    A T5 encoder never sees padding, and its prompts are stripped and lower-cased, as in IFPipeline without caption
    cleaning (DeepFloyd IF is the one family that combines T5 with a UNet2DConditionModel).

    Args:
        tokenizer: A transformers tokenizer.
        encoder: Its text encoder, CLIP or T5.
        prompts: B texts. Those longer than the encoder's limit lose their end, with a warning.

    Returns:
        (B, L, D) in float32, L the encoder's limit.
    """
    t5 = _is_t5(encoder)
    texts = [prompt.strip().lower() for prompt in prompts] if t5 else list(prompts)
    length = _token_limit(tokenizer, encoder)
    _warn_if_cut(tokenizer, texts, length)
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = t5 or getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(encoder.device) if masked else None
    with torch.autocast(encoder.device.type, enabled=False):
        return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask).last_hidden_state.float()


def cast_network(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network in place, and keep in float32 the layers that overflow in float16 (T5's ``wo``), as transformers
    does when it loads such a network in half precision.
    """
    network.to(dtype)
    if dtype != torch.float16:
        return
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for path, module in network.named_modules():
        if kept.intersection(path.split(".")):
            module.float()


def _is_t5(encoder: Any) -> bool:
    return encoder.config.model_type == "t5"


def _token_limit(tokenizer: Any, encoder: Any) -> int:
    if _is_t5(encoder):
        return _T5_LENGTH
    limit: int = tokenizer.model_max_length
    return min(limit, getattr(encoder.config, "max_position_embeddings", limit))


def _warn_if_cut(tokenizer: Any, prompts: Sequence[str], length: int) -> None:
    for prompt in dict.fromkeys(prompts):
        # verbose=False: this warning replaces the one of transformers, which does not name the lost words.
        ids = tokenizer(prompt, verbose=False).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 :], skip_special_tokens=True).strip()
            _log.warning("the prompt is longer than the prior's %d tokens; it does not see the end: %r", length, lost)
