"""Interfaces that guidance algebra and samplers require of a denoiser and of its conditionings.

:class:`scoredist3d.priors.base.Prior` and the classes of :mod:`scoredist3d.priors.conditioning` satisfy them. They are
protocols so that this package does not depend on any prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import NoiseSchedule


class ConditioningBatch(Protocol):
    """Conditioning inputs of a batch of images."""

    @property
    def device(self) -> torch.device:
        """Device of the conditioning tensors."""

    def __len__(self) -> int:
        """Number of items B."""

    def expand(self, batch: int) -> Self:
        """A single item repeated ``batch`` times; a batch of that size is returned unchanged."""

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The concatenation of several batches."""


C = TypeVar("C", bound=ConditioningBatch)
C_co = TypeVar("C_co", bound=ConditioningBatch, covariant=True)
C_contra = TypeVar("C_contra", bound=ConditioningBatch, contravariant=True)


class GuidanceConditions(Protocol[C_co]):
    """Conditionings that classifier-free guidance combines."""

    @property
    def positive(self) -> C_co:
        """Conditioning of the prompt."""

    @property
    def unconditional(self) -> C_co:
        """Conditioning of the empty or negative prompt."""

    @property
    def negatives(self) -> Sequence[tuple[C_co, Tensor]]:
        """Conditionings of Perp-Neg's additional negative prompts, with their (B,) weights."""


class Denoiser(Protocol[C_contra]):
    """A denoising network, together with its noise schedule."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The network's noise schedule."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: C_contra, /) -> Prediction:
        """The prediction for (B, C, h, w) noisy images at timesteps ``t`` (B,) in [0, 1]."""


class GuidedDenoiser(Denoiser[C_contra], Protocol[C_contra]):
    """A denoiser for classifier-free guidance and sampling."""

    @property
    def views(self) -> int:
        """Number of images that the network denoises jointly."""

    @property
    def image_size(self) -> int:
        """Side of the images that the model samples, in pixels."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of ``height`` x ``width`` pixels."""

    def limit_x0(self, x0: Tensor) -> Tensor:
        """The predicted clean image (B, C, h, w), thresholded as in the model's own sampler."""
