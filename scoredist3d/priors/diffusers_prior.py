"""The prior for text-to-image models in diffusers layout; the class of a model's denoiser selects its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.priors.aura_flow import AURA_FLOW
from scoredist3d.priors.camera_embedding import CAMERA_EMBEDDING_SIZE, camera_embedding
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.deepfloyd_upscaler import DEEPFLOYD_UPSCALER
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.flux import FLUX
from scoredist3d.priors.flux_2 import FLUX_2
from scoredist3d.priors.model_files import MISFITS
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.pipeline_prior import PipelinePrior
from scoredist3d.priors.pixart_sigma import PIXART_SIGMA
from scoredist3d.priors.qwen_image import QWEN_IMAGE
from scoredist3d.priors.sana import SANA
from scoredist3d.priors.stable_diffusion import STABLE_DIFFUSION
from scoredist3d.priors.stable_diffusion_3 import STABLE_DIFFUSION_3
from scoredist3d.priors.stable_diffusion_xl import STABLE_DIFFUSION_XL
from scoredist3d.priors.z_image import Z_IMAGE
from scoredist3d.registry import register

FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION_XL,
    DEEPFLOYD_UPSCALER,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_3,
    PIXART_SIGMA,
    FLUX,
    FLUX_2,
    Z_IMAGE,
    QWEN_IMAGE,
    SANA,
    AURA_FLOW,
)
"""The families in the order in which they are tried: those that also require a class of the pipeline come first."""


def family_of(source: PipelineSource) -> Family:
    """The family of a pipeline.

    For a model of no known family it is the UNet family, whose check rejects the model with an error that names it.
    """
    return next((family for family in FAMILIES if family.matches(source)), STABLE_DIFFUSION)


@register(
    "prior",
    "diffusers",
    summary="A text-to-image model in the layout of diffusers (Stable Diffusion, FLUX.1, ...) from a folder or hub id.",
)
class DiffusersPrior(PipelinePrior):
    """A text-to-image model from a diffusers pipeline.

    :data:`FAMILIES` lists the families that are supported; other models are rejected with an error that names their
    family (see :func:`~scoredist3d.priors.unet_support.check_unet`).
    """

    @dataclass
    class Config(PipelinePrior.Config):
        """Options of the pipeline, its precision and its image size."""

    def __init__(self, config: Config) -> None:
        """Load the model on the CPU; move it with ``.to(device)``.

        Args:
            config: Options of the prior.

        Raises:
            PriorError: The pipeline is missing, incomplete, or of a family that is not supported.
        """
        source = self.open(config)
        with source.using("the files", "used"):
            family = family_of(source)
            super().__init__(config, source, family.denoiser)
            self.text = family.load_text(source, family.denoiser.resolved(config.precision))
            self._camera_extent = source.camera_extent()

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], cameras: Cameras | None = None) -> Conditioning:
        """The text embedding, and the camera embedding for a model with camera conditioning.

        The prompts are worded as the model was trained; see :meth:`worded`.

        Raises:
            ValueError: The numbers of prompts and cameras differ.
        """
        if cameras is not None and len(cameras) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts require the same number of cameras, got {len(cameras)}")
        with self._source.using("the text encoder", "used", errors=MISFITS):
            text = self.text.conditioning([self.worded(prompt) for prompt in prompts])
        return replace(text, camera=self.camera_condition(cameras, len(prompts)))

    def camera_condition(self, cameras: Cameras | None, batch: int) -> Tensor | None:
        """(batch, 16) flattened camera matrices, zeros without cameras; None without camera conditioning."""
        if not self.takes_cameras:
            return None
        if cameras is None:
            return torch.zeros(batch, CAMERA_EMBEDDING_SIZE, device=self.device)
        return camera_embedding(cameras, self._camera_extent).to(self.device)
