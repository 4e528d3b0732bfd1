"""Text encoders of a diffusers pipeline, which convert prompts to the hidden states that its denoiser attends to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import FrozenNetwork, Precision, loading_dtype

_log = logging.getLogger("scoredist3d")
PROMPT = "{prompt}"
"""Place of the prompt in a template."""
_MOST_SHOWN = 200
"""Number of letters of ignored text that a warning shows."""


class TextEncoder(FrozenNetwork):
    """A tokenizer and its text encoder.

    Attributes:
        tokenizer: A transformers tokenizer.
        length: Number of tokens per prompt, padding included.
        inversions: Tokens of textual inversions, and the tokens of all vectors of each as text.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        precision: Precision,
        *,
        length: int | None = None,
        masks_padding: bool = False,
        lower_case: bool = False,
        warns: bool = True,
        passes_mask: bool = False,
        template: str = PROMPT,
    ) -> None:
        """Args:
        network: A transformers text encoder, e.g. CLIPTextModel or T5EncoderModel.
        tokenizer: The tokenizer of this text encoder.
        precision: Numerical precision of the network.
        length: Number of tokens per prompt; None means the smaller of the limits of tokenizer and network.
        masks_padding: Hide padding from the attention of the network, as the model's own pipeline does.
        lower_case: Strip prompts and convert them to lower case.
        warns: Warn about prompts beyond ``length``. False where another encoder of the prior reads more of the prompt,
            or warns of the same cut.
        passes_mask: Include the mask of the tokens in the conditioning, for a denoiser that attends to prompts only.
        template: Text around each prompt, with :data:`PROMPT` in its place; it counts towards ``length``. The
            tokenizer adds no special tokens to a template that begins with its own first token.
        """
        super().__init__(network, precision)
        self.tokenizer = tokenizer
        self.inversions: dict[str, str] = {}
        limit: int = tokenizer.model_max_length
        self.length = length or min(limit, getattr(self.network.config, "max_position_embeddings", limit))
        self._masks_padding = masks_padding
        self._lower_case = lower_case
        self._warns = warns
        self._passes_mask = passes_mask
        self._template = template
        first = tokenizer.bos_token
        self._adds_special_tokens = first is None or not template.startswith(first)

    @classmethod
    def load(
        cls,
        source: PipelineSource,
        precision: Precision,
        *,
        suffix: str = "",
        length: int | None = None,
        masks_padding: bool = False,
        lower_case: bool = False,
        warns: bool = True,
        passes_mask: bool = False,
        template: str = PROMPT,
    ) -> TextEncoder:
        """Load the pipeline's ``text_encoder`` and ``tokenizer``.

        Args:
            source: The pipeline.
            precision: Numerical precision of the network.
            suffix: Appended to the names of both parts, e.g. ``_2`` for the second text encoder.
            length: See :meth:`__init__`.
            masks_padding: See :meth:`__init__`.
            lower_case: See :meth:`__init__`.
            warns: See :meth:`__init__`.
            passes_mask: See :meth:`__init__`.
            template: See :meth:`__init__`.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        network = source.load_network(f"text_encoder{suffix}", loading_dtype(precision))
        tokenizer = source.load(f"tokenizer{suffix}")
        if tokenizer.pad_token is None:
            raise PriorError(
                f"{source.key}: the tokenizer{suffix} of {source.name} has no padding token in its configuration; "
                "download or export the model again"
            )
        encoder = cls(
            network,
            tokenizer,
            precision,
            length=length,
            masks_padding=masks_padding,
            lower_case=lower_case,
            warns=warns,
            passes_mask=passes_mask,
            template=template,
        )
        for inversion in source.inversions:
            encoder.inversions |= inversion.apply(f"text_encoder{suffix}", network, tokenizer)
        return encoder

    def hidden_states(self, prompts: Sequence[str]) -> Tensor:
        """The network's last hidden state, (B, L, D) in float32. The arguments are those of :meth:`outputs`."""
        return self.outputs(prompts).last_hidden_state.float()

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The hidden states as the text of a conditioning, with the mask of the tokens if the denoiser takes it."""
        return Conditioning(self.hidden_states(prompts), mask=self.mask(prompts) if self._passes_mask else None)

    def outputs(self, prompts: Sequence[str], *, all_layers: bool = False) -> Any:
        """The network's outputs as the model's own diffusers pipeline computes them, in the network's precision.

        Args:
            prompts: B texts. Text beyond ``length`` tokens is ignored, with a warning.
            all_layers: Include ``hidden_states``, the hidden states of all layers.
        """
        texts = self._texts(prompts)
        if self._warns:
            self._warn_if_truncated(texts)
        tokens = self._tokens(texts)
        mask = tokens.attention_mask.to(self.device) if self._masks_padding else None
        requested = {"output_hidden_states": True} if all_layers else {}
        with torch.autocast(self.device.type, enabled=False):
            return self.network(tokens.input_ids.to(self.device), attention_mask=mask, **requested)

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) in float32: 1 for the tokens of each prompt, 0 for padding."""
        mask: Tensor = self._tokens(self._texts(prompts)).attention_mask
        return mask.float().to(self.device)

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        texts = [prompt.strip().lower() for prompt in prompts] if self._lower_case else prompts
        texts = [self._with_all_vectors(text) for text in texts] if self.inversions else texts
        return [self._template.replace(PROMPT, text) for text in texts]

    def _with_all_vectors(self, text: str) -> str:
        """A prompt with the tokens of all vectors in the place of each token of a textual inversion."""
        for token in set(self.tokenizer.tokenize(text)).intersection(self.inversions):
            text = text.replace(token, self.inversions[token])
        return text

    def _tokens(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            add_special_tokens=self._adds_special_tokens,
            return_tensors="pt",
        )

    def _warn_if_truncated(self, prompts: Sequence[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            # verbose=False: this warning replaces that of transformers, which does not name the ignored words.
            ids = self.tokenizer(prompt, add_special_tokens=self._adds_special_tokens, verbose=False).input_ids
            if len(ids) > self.length:
                ignored = self.tokenizer.decode(ids[self.length - 1 :], skip_special_tokens=True).strip()
                ignored = ignored if len(ignored) <= _MOST_SHOWN else f"{ignored[:_MOST_SHOWN]} ..."
                _log.warning(
                    "the prompt is longer than the prior's limit of %d tokens; its end is ignored: %r",
                    self.length,
                    ignored,
                )
