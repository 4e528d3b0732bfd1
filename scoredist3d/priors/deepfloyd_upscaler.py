"""The family of DeepFloyd IF's stage II: a super-resolution model in pixels, conditioned on a low-resolution image.

Its network denoises images of 256 x 256 pixels and also receives an image of 64 x 64 pixels, enlarged and with a known
amount of noise. In score distillation there is no image from stage I. The low-resolution image is that of the render
itself: the network then proposes details that agree with the coarse content of the render and with the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.diffusion.schedule import NoiseSchedule, per_item
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.stable_diffusion import UNetDenoiser, load_text_encoder
from scoredist3d.priors.unet_support import check_unet

ENLARGEMENT = 4
"""Ratio of the sizes of stage II and stage I."""
_NOISE_LEVEL = 250
"""Default of IFSuperResolutionPipeline."""


class UpscalingUNet(UNetDenoiser):
    """A UNet2DConditionModel whose input is a noisy image and an enlarged low-resolution image, side by side."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """The arguments are those of :class:`~scoredist3d.priors.denoiser.DenoiserNetwork`."""
        super().__init__(source, precision)
        self._noising = NoiseSchedule.from_config(source.scheduler_config("image_noising_scheduler"))

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the UNet takes a text and the noise level of an image."""
        check_unet(source, class_embedding="timestep")

    @property
    def used_options(self) -> frozenset[str]:
        """The noise level of the low-resolution image."""
        return frozenset({"noise_level"})

    @property
    def channels(self) -> int:
        """Number of channels of the images, half of the network's inputs."""
        return int(self.network.config.in_channels) // 2

    @property
    def noise_level(self) -> int:
        """Timestep of the noise in the low-resolution image."""
        return _NOISE_LEVEL if self.options.noise_level is None else self.options.noise_level

    def image_condition(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """The renders, reduced to a quarter of their size, enlarged as in IFSuperResolutionPipeline, and noisy."""
        height, width = latents.shape[-2:]
        small = (max(1, height // ENLARGEMENT), max(1, width // ENLARGEMENT))
        low = functional.interpolate(latents, small, mode="bilinear", align_corners=False, antialias=True)
        return self.noisy(functional.interpolate(low, (height, width), mode="bilinear", align_corners=True), generator)

    def noisy(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """An enlarged image (B, 3, H, W) in [-1, 1] with noise of :attr:`noise_level`."""
        noise = torch.randn(image.shape, generator=generator, device=generator.device).to(image)
        t = torch.full((len(image),), self.noise_level / self._noising.num_train_timesteps, device=image.device)
        alpha, sigma = (per_item(value, image) for value in self._noising.coefficients(t))
        return alpha * image + sigma * noise

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and low-resolution image.

        Raises:
            ValueError: The conditioning has no image.
        """
        if conditioning.image is None:
            raise ValueError(
                f"{self.name} needs a low-resolution image; add it to the conditions with prior.with_image"
            )
        return {"encoder_hidden_states": conditioning.text, "image": conditioning.image}

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The UNet's output for the noisy image and the low-resolution image."""
        text = {
            "encoder_hidden_states": inputs["encoder_hidden_states"],
            "class_labels": timestep.new_full((len(x),), self.noise_level),
        }
        return super().call(torch.cat([x, inputs["image"]], dim=1), timestep, text)


DEEPFLOYD_UPSCALER = Family(UpscalingUNet, load_text_encoder, pipelines=("IFSuperResolutionPipeline",))
