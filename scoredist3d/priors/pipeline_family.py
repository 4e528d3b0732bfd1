"""What a family of text-to-image models adds to the diffusers prior: a denoiser and a text encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import Precision


class PromptEncoder(Protocol):
    """The text encoders of a pipeline, as one module."""

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The text parts of the conditioning of ``prompts``, as the family's own diffusers pipeline computes them."""


SUPPORTED = (
    "Stable Diffusion 1.x, 2.x, 3.x and XL, DeepFloyd IF (stages I and II), PixArt-Sigma, FLUX.1, FLUX.2, Z-Image, "
    "Qwen-Image, Sana and AuraFlow are supported"
)
"""The families of :data:`~scoredist3d.priors.diffusers_prior.FAMILIES`, for error messages."""


@dataclass(frozen=True)
class Family:
    """A family of text-to-image models, recognized by the classes of its denoising network and of its pipeline.

    Attributes:
        denoiser: Calls the network; its ``part`` and ``networks`` are the name and the classes of the network in
            ``model_index.json``.
        load_text: Loads the text encoders of a pipeline in a given precision.
        pipelines: diffusers classes of the pipeline, as in ``model_index.json``; empty if the network's class is
            sufficient.
    """

    denoiser: type[DenoiserNetwork]
    load_text: Callable[[PipelineSource, Precision], PromptEncoder]
    pipelines: tuple[str, ...] = ()

    def matches(self, source: PipelineSource) -> bool:
        """Whether the pipeline's denoiser is of this family."""
        part = self.denoiser.part
        if not source.has(part) or source.index[part][1] not in self.denoiser.networks:
            return False
        return not self.pipelines or source.index.get("_class_name") in self.pipelines
