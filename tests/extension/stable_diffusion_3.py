"""Stable Diffusion 3 (arXiv 2403.03206) as a prior: a flow-matching transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.priors.adapters import AdapterPoints, attention_projections
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_prior import PipelinePrior
from scoredist3d.priors.text_encoding import TextEncoder
from scoredist3d.registry import register

T5_LENGTH = 256


class JointTransformer(DenoiserNetwork):
    """SD3Transformer2DModel, conditioned on hidden states and on a pooled embedding of the prompt."""

    part = "transformer"

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        super().__init__(source, precision)
        self.patch_size = self.network.config.patch_size

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Hidden states and pooled embedding."""
        return {"encoder_hidden_states": conditioning.text, "pooled_projections": conditioning.pooled}

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the sum of timestep and pooled text embedding."""
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
        return AdapterPoints(
            network=self.network,
            linears=attention_projections(self.network, names),
            time_embedding="time_text_embed",
            width=self.network.inner_dim,
            text_width=self.network.config.joint_attention_dim,
        )


@register("prior", "stable-diffusion-3", summary="Stable Diffusion 3: flow matching with a joint transformer.")
class StableDiffusion3(PipelinePrior):
    """Stable Diffusion 3 from a diffusers pipeline, with or without its T5 encoder."""

    @dataclass
    class Config(PipelinePrior.Config):
        """The pipeline, its precision and its image size."""

    denoiser_class = JointTransformer

    def __init__(self, config: Config) -> None:
        source = self.open(config)
        super().__init__(config, source)
        self.clip = TextEncoder.load(source, config.precision)
        self.clip_2 = TextEncoder.load(source, config.precision, suffix="_2")
        self.t5 = None
        if source.has("text_encoder_3"):
            self.t5 = TextEncoder.load(source, config.precision, suffix="_3", length=T5_LENGTH)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], cameras: Cameras | None = None) -> Conditioning:
        """Both CLIP embeddings side by side, padded to T5's width and followed by T5's embedding."""
        outputs = [encoder.outputs(prompts, all_layers=True) for encoder in (self.clip, self.clip_2)]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1).float()
        width = self.denoiser.network.config.joint_attention_dim
        if self.t5 is None:
            t5 = clip.new_zeros(len(prompts), T5_LENGTH, width)
        else:
            t5 = self.t5.hidden_states(prompts)
        text = torch.cat([functional.pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        return Conditioning(text, pooled=pooled)
