"""The family of FLUX.1, dev and schnell: flow matching with a joint transformer on packed latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.packed_latents import PATCH, PackedTransformer, packed, unpacked
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import TextEncoder

_T5_LENGTH, _DISTILLED_GUIDANCE = 512, 3.5
"""Defaults of FluxPipeline."""


class GuidedTransformer(PackedTransformer):
    """A FluxTransformer2DModel, whose tokens are patches of 2 x 2 latent pixels; with or without distilled guidance."""

    networks = ("FluxTransformer2DModel",)

    @property
    def used_options(self) -> frozenset[str]:
        """The distilled guidance, for a model with this input."""
        return frozenset({"distilled_guidance"}) if self.network.config.guidance_embeds else frozenset()

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and pooled text embedding."""
        return {"encoder_hidden_states": conditioning.text, "pooled_projections": conditioning.pooled}

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The unpacked output for latents, which are packed here."""
        given = self.options.distilled_guidance
        scale = timestep.new_full((len(x),), _DISTILLED_GUIDANCE if given is None else given)
        output = self.network(
            hidden_states=packed(x),
            timestep=timestep.to(x.dtype) / 1000.0,
            guidance=scale if self.network.config.guidance_embeds else None,
            txt_ids=x.new_zeros(inputs["encoder_hidden_states"].shape[1], 3),
            img_ids=positions(x),
            **inputs,
            return_dict=False,
        )[0]
        return unpacked(output, x)


def positions(x: Tensor) -> Tensor:
    """(h w / 4, 3), 0, row and column of each token of latents (B, C, h, w)."""
    rows, columns = (torch.arange(side // PATCH, device=x.device) for side in x.shape[-2:])
    return nn.functional.pad(torch.cartesian_prod(rows, columns), (1, 0)).to(x.dtype)


class PooledClipAndT5(nn.Module):
    """A CLIP encoder for the pooled embedding and a T5 encoder for the text embedding."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the encoders on the CPU.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        super().__init__()
        self.training = False
        self.clip = TextEncoder.load(source, precision, warns=False)
        self.t5 = TextEncoder.load(source, precision, suffix="_2", length=_T5_LENGTH)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """T5's hidden states (B, L, D), padding included, and CLIP's pooled embeddings (B, P), in float32."""
        return Conditioning(self.t5.hidden_states(prompts), pooled=self.clip.outputs(prompts).pooler_output.float())


FLUX = Family(GuidedTransformer, PooledClipAndT5, pipelines=("FluxPipeline",))
