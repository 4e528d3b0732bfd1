"""The family of Sana (arXiv 2410.10629): flow matching with linear attention in a deeply compressed latent space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import PROMPT, TextEncoder

_LENGTH = 300
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image \
generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships \
to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully \
on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a \
diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any additional commentary or \
evaluations:
User Prompt: \
"""
"""Defaults of SanaPipeline: number of tokens, and the complex human instruction, which the model was trained with."""


class SanaTransformer(DenoiserNetwork):
    """A SanaTransformer2DModel without distilled guidance."""

    part = "transformer"
    networks = ("SanaTransformer2DModel",)
    automatic = "auto-bf16"

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """The arguments are those of :class:`~scoredist3d.priors.denoiser.DenoiserNetwork`."""
        super().__init__(source, precision)
        self.patch_size = self.network.config.patch_size

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the transformer takes no guidance scale."""
        super().check(source)
        if source.network_config(cls.part).get("guidance_embeds"):
            raise PriorError(
                f"{source.key}: the transformer of {source.name} needs distilled guidance (Sana Sprint); use a model "
                "for SanaPipeline"
            )

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and the mask of its tokens."""
        return {"encoder_hidden_states": conditioning.text, "encoder_attention_mask": conditioning.mask}

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
        length = len(tokenizer(INSTRUCTION).input_ids) + _LENGTH - 2
        template = INSTRUCTION + PROMPT
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
