"""The denoising network of a diffusers pipeline: precision, timestep, variance channels and noise schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import FrozenNetwork, Precision, loading_dtype
from scoredist3d.priors.model_options import ModelOptions


class DenoiserNetwork(FrozenNetwork, ABC):
    """The network that predicts noise, clean image or velocity, called as diffusers' own pipelines call it.

    A family implements :meth:`inputs` and :meth:`adapter_points`. A network that takes other arguments than these
    inputs, or latents in another layout, also overrides :meth:`call`. Latents, timesteps and predictions keep the
    caller's data type; only the network computes in its own precision, outside of autocast.

    Attributes:
        part: Name of the network in the pipeline's index.
        networks: diffusers classes of the network, as in the index; empty for any class.
        automatic: Precision of the networks of the family if the configuration says ``auto``.
        upcasts_autoencoder: Whether an autoencoder with ``force_upcast`` in its configuration, which overflows in
            float16, stays in float32.
        options: Values of the options; set by :meth:`configure`.
        factor: Side of the block of pixels that one latent pixel represents; set by :meth:`configure`.
        name: The pipeline's folder or hub id.
        schedule: Noise schedule, from the pipeline's scheduler configuration.
        takes_cameras: Whether the network is conditioned on cameras.
        patch_size: Divisor of the height and width of latents; larger than 1 for transformers.
    """

    part: ClassVar[str] = "unet"
    networks: ClassVar[tuple[str, ...]] = ()
    automatic: ClassVar[Precision] = "auto"
    upcasts_autoencoder: ClassVar[bool] = False
    options: ModelOptions
    factor: int = 1
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
        precision = self.resolved(precision)
        scheduler = source.scheduler_config()
        schedule = NoiseSchedule.from_config(scheduler, image_tokens=1024)  # finds errors before the weights are read
        super().__init__(source.load_network(self.part, loading_dtype(precision)), precision)
        self.name, self.schedule, self.options = source.name, schedule, ModelOptions()
        self._scheduler, self._key = scheduler, source.key

    @classmethod
    def resolved(cls, precision: Precision) -> Precision:
        """The precision of the networks of this family for a configured one."""
        return cls.automatic if precision == "auto" else precision

    @property
    def used_options(self) -> frozenset[str]:
        """Names of the :class:`~scoredist3d.priors.model_options.ModelOptions` that the network uses."""
        return frozenset()

    def configure(self, options: ModelOptions, factor: int, image_size: int) -> None:
        """Set what depends on the options, the autoencoder and the size of the images.

        Args:
            options: Options of the configuration.
            factor: Side of the block of pixels that one latent pixel represents.
            image_size: Side of the images in pixels. A flow schedule may depend on it.

        Raises:
            PriorError: An option is set that the network does not use.
        """
        unused = [name for name in options.given() if name not in self.used_options]
        if unused:
            raise PriorError(
                f"prior.{unused[0]}: {self.name} ({type(self.network).__name__}) has no such input; remove the option"
            )
        self.options, self.factor = options, factor
        tokens = max(1, image_size // (factor * self.patch_size)) ** 2
        self.schedule = self.noise_schedule(self._scheduler, tokens)

    def noise_schedule(self, config: Mapping[str, Any], tokens: int) -> NoiseSchedule:
        """The noise schedule for a scheduler configuration and images of ``tokens`` tokens of the network."""
        return NoiseSchedule.from_config(config, image_tokens=tokens)

    @abstractmethod
    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Keyword arguments of the network besides the noisy latents and the timestep, in any data type."""

    def image_condition(self, latents: Tensor, generator: torch.Generator) -> Tensor | None:
        """The image of :class:`Conditioning` for latents of renders; None for a network that takes none."""
        return None

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The network's output, (B, C, h, w) or more channels.

        Args:
            x: (B, C, h, w), noisy latents in the network's data type.
            timestep: (B,), the timestep in the units of the schedule, e.g. 0 to 999.
            inputs: The result of :meth:`inputs`, in the network's data type.
        """
        output: Tensor = self.network(x, timestep=timestep, **inputs, return_dict=False)[0]
        return output

    @abstractmethod
    def adapter_points(self) -> AdapterPoints:
        """Modules where adapters can be attached."""

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check the network's class, and in subclasses its configuration, before its weights are read.

        Raises:
            PriorError: The pipeline's network is not supported by this family.
        """
        if cls.networks and (not source.has(cls.part) or source.index[cls.part][1] not in cls.networks):
            raise PriorError(
                f"{source.key}: {source.name} has no {cls.part} of class {cls.networks[0]}; use a model of the same "
                "family"
            )

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
            output = self.call(x_t.to(self.dtype), self.schedule.model_timestep(t), inputs)
        # Models that also predict a variance (DeepFloyd IF, PixArt-Sigma) return it as additional channels.
        output = output[:, : x_t.shape[1]].to(x_t.dtype)
        return Prediction(output, self.schedule.prediction_type, x_t, t, self.schedule)
