"""Joint transformers whose image tokens are patches of 2 x 2 latent pixels, as in FLUX.1 and Qwen-Image."""

from __future__ import annotations

from abc import ABC

from torch import Tensor
from torch.nn import functional

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.denoiser import DenoiserNetwork

PATCH = 2
_SAMPLE_SIZE = 128
"""Default of the pipelines of both families, which is not in the configuration of the models."""


class PackedTransformer(DenoiserNetwork, ABC):
    """Base class of transformers that take packed latents; subclasses pack and unpack them in ``call``."""

    part = "transformer"
    automatic = "auto-bf16"
    patch_size = PATCH
    sample_size = _SAMPLE_SIZE

    @property
    def channels(self) -> int:
        """Number of latent channels C, before packing."""
        return int(self.network.config.in_channels) // PATCH**2

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the sum of the embeddings of timestep and other conditions."""
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="time_text_embed",
            width=self.network.inner_dim,
            text_width=self.network.config.joint_attention_dim,
        )


def packed(x: Tensor) -> Tensor:
    """Tokens (B, h w / 4, 4 C) of latents (B, C, h, w)."""
    return functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """Latents with the shape of ``like`` from their tokens."""
    height, width = like.shape[-2] // PATCH, like.shape[-1] // PATCH
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)
