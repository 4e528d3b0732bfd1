"""The family of Sana (arXiv 2410.10629): flow matching with linear attention in a deeply compressed latent space."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import Tensor, nn

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.masked_text_transformer import MaskedTextTransformer
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import PROMPT, TextEncoder

_LENGTH = 300
"""Number of tokens, the default of SanaPipeline."""


class SanaTransformer(MaskedTextTransformer):
    """A SanaTransformer2DModel without distilled guidance."""

    networks = ("SanaTransformer2DModel",)
    automatic = "auto-bf16"

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the transformer takes no guidance scale."""
        super().check(source)
        if source.network_config(cls.part).get("guidance_embeds"):
            raise PriorError(
                f"{source.key}: the transformer of {source.name} needs distilled guidance (Sana Sprint); use a model "
                "for SanaPipeline"
            )

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The network's output for timesteps in the units of its configuration."""
        return super().call(x, timestep * self.network.config.timestep_scale, inputs)

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the timestep embedding."""
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="time_embed.emb",
            width=self.network.scale_shift_table.shape[-1],
            text_width=self.network.config.caption_channels,
        )


def instruction() -> str:
    """The complex human instruction, with which the model was trained: the default of SanaPipeline."""
    from diffusers import SanaPipeline

    lines = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


class InstructedTextEncoder(nn.Module):
    """A Gemma model that reads each prompt after an instruction, and the empty prompt without it."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the model on the CPU.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        super().__init__()
        self.training = False
        options: dict[str, Any] = {"masks_padding": True, "lower_case": True, "passes_mask": True}
        self.plain = TextEncoder.load(source, precision, length=_LENGTH, **options)
        tokenizer = self.plain.tokenizer
        tokenizer.padding_side = "right"
        # As in the pipeline, two of the tokens are counted in the instruction.
        length = len(tokenizer(instruction()).input_ids) + _LENGTH - 2
        template = instruction() + PROMPT
        self.instructed = TextEncoder(
            self.plain.network, tokenizer, precision, length=length, template=template, **options
        )

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The last hidden states (B, L, D) and the mask of their tokens (B, L), in float32.

        Of a prompt with instruction, these are the first token and the last ones of the prompt and its padding.
        """
        return Conditioning.cat([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: str) -> Conditioning:
        if not prompt.strip():
            return self.plain.conditioning([prompt])
        every = self.instructed.conditioning([prompt])
        kept = [0, *range(1 - _LENGTH, 0)]
        return Conditioning(every.text[:, kept], mask=None if every.mask is None else every.mask[:, kept])


SANA = Family(SanaTransformer, InstructedTextEncoder, pipelines=("SanaPipeline",))
