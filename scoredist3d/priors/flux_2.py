"""The family of FLUX.2, dev and klein: flow matching with a joint transformer on normalized patches of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import PROMPT, TextEncoder

_LENGTH, _STEPS, _SAMPLE_SIZE, _DISTILLED_GUIDANCE = 512, 50, 64, 4.0
"""Defaults of the pipelines: tokens, sampling steps, 1024 pixels at 16 per latent pixel, and distilled guidance."""
_MISTRAL_LAYERS, _QWEN_LAYERS = (10, 20, 30), (9, 18, 27)
_IMAGE_TOKEN = "[IMG]"
"""Token that stands for an image; as in the pipeline, it is removed from prompts."""
_QWEN_TEMPLATE = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Chat template of Qwen3 for one message. The templates of the folders, programs in Jinja, are not run."""


def _mistral_template() -> str:
    """Chat template of Mistral 3 for the pipeline's system message and one message."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    return f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]{PROMPT}[/INST]"


class Flux2Transformer(DenoiserNetwork):
    """A Flux2Transformer2DModel, with distilled guidance (dev) or without (klein)."""

    part = "transformer"
    networks = ("Flux2Transformer2DModel",)
    automatic = "auto-bf16"
    sample_size = _SAMPLE_SIZE

    @property
    def used_options(self) -> frozenset[str]:
        """The distilled guidance, for a model with this input."""
        return frozenset(("distilled_guidance",) if self.network.config.guidance_embeds else ())

    def noise_schedule(self, config: Mapping[str, Any], tokens: int) -> NoiseSchedule:
        """The schedule with the pipeline's shift, which replaces that of the configuration."""
        mu = shift_exponent(tokens, _STEPS)
        return super().noise_schedule({**config, "base_shift": mu, "max_shift": mu}, tokens)

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding."""
        return {"encoder_hidden_states": conditioning.text}

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The output for latents, each pixel of which is a token; positions are (image, row, column, text token)."""
        given = self.options.distilled_guidance
        guidance = timestep.new_full((len(x),), _DISTILLED_GUIDANCE if given is None else given)
        rows, columns, words = (
            torch.arange(count, device=x.device) for count in (*x.shape[-2:], inputs["encoder_hidden_states"].shape[1])
        )
        output: Tensor = self.network(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=timestep.to(x.dtype) / 1000.0,
            guidance=guidance if self.network.config.guidance_embeds else None,
            img_ids=nn.functional.pad(torch.cartesian_prod(rows, columns), (1, 1)),
            txt_ids=nn.functional.pad(words[:, None], (3, 0)),
            **inputs,
            return_dict=False,
        )[0]
        return output.transpose(1, 2).unflatten(2, x.shape[-2:])

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the embedding of timestep and distilled guidance."""
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="time_guidance_embed",
            width=self.network.inner_dim,
            text_width=self.network.config.joint_attention_dim,
        )


def shift_exponent(tokens: int, steps: int) -> float:
    """Logarithm of the timestep shift: linear in the steps between 10 and 200 of them, and in the image tokens.

    For more than 4300 tokens, it is that of 200 steps.
    """
    few, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    return many if tokens > 4300 else many + (few - many) * (200 - steps) / 190


class LayersTextEncoder(nn.Module):
    """A language model of which several hidden layers, side by side, are the text embedding."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the model on the CPU: Mistral for dev, Qwen3 for klein.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        super().__init__()
        self.training = False
        self._is_dev = source.index["_class_name"] == "Flux2Pipeline"
        self._layers = _MISTRAL_LAYERS if self._is_dev else _QWEN_LAYERS
        template = _mistral_template() if self._is_dev else _QWEN_TEMPLATE
        self.model = TextEncoder.load(source, precision, length=_LENGTH, masks_padding=True, template=template)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The hidden states (B, L, 3 D), padding included, in float32."""
        texts = [prompt.replace(_IMAGE_TOKEN, "") for prompt in prompts] if self._is_dev else prompts
        states = self.model.outputs(texts, all_layers=True).hidden_states
        return Conditioning(torch.cat([states[layer] for layer in self._layers], dim=-1).float())


FLUX_2 = Family(Flux2Transformer, LayersTextEncoder, pipelines=("Flux2Pipeline", "Flux2KleinPipeline"))
