"""The denoising network of a diffusers pipeline: precision, timestep, variance channels and noise schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.frozen_network import FrozenNetwork, Precision, loading_dtype


class DenoiserNetwork(FrozenNetwork, ABC):
    """The network that predicts noise, clean image or velocity, called as diffusers' own pipelines call it.

    A family implements :meth:`inputs` and :meth:`adapter_points`. Latents, timesteps and predictions keep the caller's
    data type; only the network computes in its own precision, outside of autocast.

    Attributes:
        part: Name of the network in the pipeline's index.
        name: The pipeline's folder or hub id.
        schedule: Noise schedule, from the pipeline's scheduler configuration.
        takes_cameras: Whether the network is conditioned on cameras.
        patch_size: Divisor of the height and width of latents; larger than 1 for transformers.
    """

    part: ClassVar[str] = "unet"
    name: str
    schedule: NoiseSchedule
    takes_cameras: bool = False
    patch_size: int = 1

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the network on the CPU.

        Args:
            source: The pipeline.
            precision: Numerical precision of the network.

        Raises:
            PriorError: The network is missing, incomplete, or of a kind that the family does not support.
        """
        self.check(source)
        schedule = NoiseSchedule.from_config(source.scheduler_config())
        super().__init__(source.load_network(self.part, loading_dtype(precision)), precision)
        self.name, self.schedule = source.name, schedule

    @abstractmethod
    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Keyword arguments of the network besides the noisy latents and the timestep."""

    @abstractmethod
    def adapter_points(self) -> AdapterPoints:
        """Modules where adapters can be attached."""

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check the network's configuration before its weights are read.

        Raises:
            PriorError: The pipeline's network is not supported by this family.
        """

    @property
    def channels(self) -> int:
        """Number of latent channels C."""
        return self.network.config.in_channels

    @property
    def sample_size(self) -> int:
        """Height in latent pixels of the samples that the network was trained on."""
        size = self.network.config.sample_size
        return size if isinstance(size, int) else size[0]

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """The network's output for (B, C, h, w) latents at timesteps ``t`` (B,) in [0, 1]."""
        inputs = {
            name: None if value is None else value.to(self.dtype) for name, value in self.inputs(conditioning).items()
        }
        with torch.autocast(x_t.device.type, enabled=False):
            output = self.network(
                x_t.to(self.dtype), timestep=self.schedule.model_timestep(t), **inputs, return_dict=False
            )[0]
        # Models that also predict a variance (DeepFloyd) return it as additional channels.
        output = output[:, : x_t.shape[1]].to(x_t.dtype)
        return Prediction(output, self.schedule.prediction_type, x_t, t, self.schedule)
