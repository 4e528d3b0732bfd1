"""The UNet family: Stable Diffusion 1.x and 2.x, the first stage of DeepFloyd IF, and camera-conditioned variants."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import TextEncoder
from scoredist3d.priors.unet_support import NETWORK, check_unet, takes_cameras, text_width

_T5_LENGTH = 77
"""Number of tokens per prompt in the training of DeepFloyd IF; T5 itself has no limit."""


class UNetDenoiser(DenoiserNetwork):
    """A UNet2DConditionModel that attends to a text embedding, with or without camera conditioning.

    A UNet with ``class_embed_type: projection`` and 16 inputs is conditioned on cameras (see
    :func:`~scoredist3d.priors.camera_embedding.camera_embedding`).
    """

    networks = (NETWORK,)

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """The arguments are those of :class:`DenoiserNetwork`."""
        super().__init__(source, precision)
        self.takes_cameras = takes_cameras(self.network.config)

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the UNet needs no inputs other than the text embedding and, optionally, a camera."""
        check_unet(source)

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and camera embedding.

        Raises:
            ValueError: The model is conditioned on cameras and the conditioning has no camera embedding.
        """
        if self.takes_cameras and conditioning.camera is None:
            raise ValueError(f"{self.name} is conditioned on cameras; make the conditioning with prior.embed")
        return {"encoder_hidden_states": conditioning.text, "class_labels": conditioning.camera}

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the timestep embedding."""
        width = self.network.time_embedding.linear_2.out_features
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="time_embedding",
            width=width,
            text_width=text_width(self.network.config),
        )


def load_text_encoder(source: PipelineSource, precision: Precision) -> TextEncoder:
    """The text encoder of a UNet model, CLIP or T5.

    A CLIP encoder attends to padding unless its configuration sets ``use_attention_mask``, as in
    StableDiffusionPipeline. A T5 encoder does not attend to padding, and its prompts are stripped and lower-cased, as
    in IFPipeline without caption cleaning (DeepFloyd IF is the only family that combines T5 with a
    UNet2DConditionModel).

    Raises:
        PriorError: A part is missing or incomplete.
    """
    config = source.network_config("text_encoder")
    if config.get("model_type") == "t5":
        return TextEncoder.load(source, precision, length=_T5_LENGTH, masks_padding=True, lower_case=True)
    return TextEncoder.load(source, precision, masks_padding=bool(config.get("use_attention_mask", False)))


STABLE_DIFFUSION = Family(UNetDenoiser, load_text_encoder)
