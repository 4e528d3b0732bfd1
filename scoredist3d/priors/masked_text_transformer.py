"""Base of transformers that attend to a text embedding with a mask."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision


class MaskedTextTransformer(DenoiserNetwork):
    """A transformer on patches of latents, with cross-attention to the tokens of a prompt that are no padding."""

    part = "transformer"

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """The arguments are those of :class:`~scoredist3d.priors.denoiser.DenoiserNetwork`."""
        super().__init__(source, precision)
        self.patch_size = self.network.config.patch_size

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and the mask of its tokens."""
        return {"encoder_hidden_states": conditioning.text, "encoder_attention_mask": conditioning.mask}
