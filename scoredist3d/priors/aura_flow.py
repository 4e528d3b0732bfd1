"""The family of AuraFlow: flow matching with a transformer on a T5-style text embedding without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.model_options import ModelOptions
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import TextEncoder

_LENGTH, _SAMPLE_SIZE = 256, 128
"""Defaults of AuraFlowPipeline: number of tokens, and 1024 pixels at 8 pixels per latent pixel."""


class AuraFlowTransformer(DenoiserNetwork):
    """An AuraFlowTransformer2DModel, which has learned embeddings for a limited number of positions."""

    part = "transformer"
    networks = ("AuraFlowTransformer2DModel",)
    upcasts_autoencoder = True  # it is that of Stable Diffusion XL
    sample_size = _SAMPLE_SIZE

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """The arguments are those of :class:`~scoredist3d.priors.denoiser.DenoiserNetwork`."""
        super().__init__(source, precision)
        self.patch_size = self.network.config.patch_size

    @property
    def _largest(self) -> int:
        """Largest side of latents that the embeddings of positions cover."""
        return int(self.network.config.pos_embed_max_size**0.5) * self.patch_size

    def configure(self, options: ModelOptions, factor: int, image_size: int) -> None:
        """Check that the images are not too large; see :meth:`DenoiserNetwork.configure`."""
        super().configure(options, factor, image_size)
        if image_size > factor * self._largest:
            raise PriorError(
                f"prior.image_size: {self.name} has embeddings for positions of {factor * self._largest} pixels; "
                f"use at most this size instead of {image_size}"
            )

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding."""
        return {"encoder_hidden_states": conditioning.text}

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The network's output; its timestep is in [0, 1], in its data type.

        Raises:
            ValueError: A side of the latents is too large, which the network would not notice.
        """
        if max(x.shape[-2:]) > self._largest:
            raise ValueError(f"{self.name} takes latents of at most {self._largest} pixels, not {tuple(x.shape[-2:])}")
        return super().call(x, (timestep / 1000.0).to(x.dtype), inputs)

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the timestep embedding."""
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="time_step_proj",
            width=self.network.inner_dim,
            text_width=self.network.config.joint_attention_dim,
        )


class PaddedTextEncoder(TextEncoder):
    """A text encoder whose hidden states are zero at the padding."""

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The hidden states (B, L, D) in float32; the denoiser attends to all of them."""
        return Conditioning(self.hidden_states(prompts) * self.mask(prompts)[..., None])


def load_umt5(source: PipelineSource, precision: Precision) -> TextEncoder:
    """The UMT5 encoder.

    Raises:
        PriorError: A part is missing or incomplete.
    """
    return PaddedTextEncoder.load(source, precision, length=_LENGTH, masks_padding=True)


AURA_FLOW = Family(AuraFlowTransformer, load_umt5, pipelines=("AuraFlowPipeline",))
