"""The family of PixArt-Sigma (arXiv 2403.04692): a diffusion transformer that attends to a masked T5 embedding."""

from __future__ import annotations

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.masked_text_transformer import MaskedTextTransformer
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import TextEncoder

_LENGTH = 300
"""Number of T5 tokens, the default of PixArtSigmaPipeline."""


class MaskedTransformer(MaskedTextTransformer):
    """A PixArtTransformer2DModel; it predicts the noise and a variance, of which the noise is used."""

    networks = ("PixArtTransformer2DModel", "Transformer2DModel")  # diffusers converts the older class to the first
    upcasts_autoencoder = True  # it is that of Stable Diffusion XL

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the transformer takes no image sizes."""
        super().check(source)
        if source.network_config(cls.part).get("use_additional_conditions"):
            raise PriorError(
                f"{source.key}: the transformer of {source.name} needs a resolution and an aspect ratio "
                "(PixArt-Alpha); use a model of the PixArt-Sigma family"
            )

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the timestep embedding."""
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="adaln_single.emb",
            width=self.network.inner_dim,
            text_width=self.network.config.caption_channels,
        )


def load_masked_t5(source: PipelineSource, precision: Precision) -> TextEncoder:
    """The T5 encoder; prompts are stripped and lower-cased, as in PixArtSigmaPipeline without caption cleaning.

    Raises:
        PriorError: A part is missing or incomplete.
    """
    return TextEncoder.load(source, precision, length=_LENGTH, masks_padding=True, lower_case=True, passes_mask=True)


PIXART_SIGMA = Family(MaskedTransformer, load_masked_t5, pipelines=("PixArtSigmaPipeline",))
