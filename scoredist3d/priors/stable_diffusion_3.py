"""The family of Stable Diffusion 3 and 3.5 (arXiv 2403.03206): flow matching with a joint transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import TextEncoder

CAMERA_TOKEN = "_camera_token"
"""Entry of ``model_index.json``: true for a model whose last context token is a camera; diffusers ignores it."""
T5_LENGTH = "_max_sequence_length"
"""Entry of ``model_index.json``: number of T5 tokens, if it is not the default of StableDiffusion3Pipeline."""
_DEFAULT_T5_LENGTH = 256


class JointTransformer(DenoiserNetwork):
    """An SD3Transformer2DModel, with or without camera conditioning.

    A model with :data:`CAMERA_TOKEN` in its index receives the camera as one more context token: the 16 numbers of
    :func:`~scoredist3d.priors.camera_embedding.camera_embedding`, followed by zeros. Without a camera the token is
    zero. It is then the token of an absent T5 encoder, so StableDiffusion3Pipeline with one T5 token more makes the
    same prediction.
    """

    part = "transformer"
    networks = ("SD3Transformer2DModel",)

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """The arguments are those of :class:`DenoiserNetwork`."""
        super().__init__(source, precision)
        self.patch_size = self.network.config.patch_size
        self.takes_cameras = bool(source.index.get(CAMERA_TOKEN, False))

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Context tokens and pooled text embedding.

        Raises:
            ValueError: The model is conditioned on cameras and the conditioning has no camera embedding.
        """
        context = conditioning.text
        if self.takes_cameras:
            if conditioning.camera is None:
                raise ValueError(f"{self.name} is conditioned on cameras; make the conditioning with prior.embed")
            context = with_camera_token(context, conditioning.camera)
        return {"encoder_hidden_states": context, "pooled_projections": conditioning.pooled}

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the sum of timestep and pooled text embedding."""
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="time_text_embed",
            width=self.network.inner_dim,
            text_width=self.network.config.joint_attention_dim,
        )


class JointTextEncoder(nn.Module):
    """Two CLIP encoders and an optional T5 encoder."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the encoders on the CPU.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        super().__init__()
        self.training = False
        self.clip = TextEncoder.load(source, precision)
        self.clip_2 = TextEncoder.load(source, precision, suffix="_2", length=self.clip.length, warns=False)
        self._t5_length = int(source.index.get(T5_LENGTH, _DEFAULT_T5_LENGTH))
        self._width: int = source.network_config("transformer")["joint_attention_dim"]
        self.t5 = None
        if source.has("text_encoder_3"):
            self.t5 = TextEncoder.load(source, precision, suffix="_3", length=self._t5_length)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Context tokens (B, L, D) and pooled embeddings (B, P) in float32; without T5, its tokens are zero."""
        outputs = [encoder.outputs(prompts, all_layers=True) for encoder in (self.clip, self.clip_2)]
        context, pooled = joint_embedding(outputs, self._width)
        absent = context.new_zeros(len(prompts), self._t5_length, self._width)
        t5 = absent if self.t5 is None else self.t5.hidden_states(prompts)
        return Conditioning(torch.cat([context, t5], dim=1), pooled=pooled)


def joint_embedding(outputs: Sequence[Any], width: int) -> tuple[Tensor, Tensor]:
    """Context tokens (B, L, width) and pooled embeddings (B, P) in float32 from the outputs of both CLIP encoders."""
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1).float()
    return functional.pad(context, (0, width - context.shape[-1])), pooled


def with_camera_token(context: Tensor, camera: Tensor) -> Tensor:
    """Context tokens (B, L, D) followed by one token that holds camera embeddings (B, 16)."""
    token = functional.pad(camera.to(context), (0, context.shape[-1] - camera.shape[-1]))
    return torch.cat([context, token[:, None]], dim=1)


STABLE_DIFFUSION_3 = Family(JointTransformer, JointTextEncoder)
