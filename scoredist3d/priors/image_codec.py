"""Conversion between images and the latents of a denoiser: through an autoencoder, or to pixels in [-1, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import FrozenNetwork, Precision, loading_dtype

VAE_KEY = "prior.vae"


class ImageCodec(nn.Module, ABC):
    """Encoder and decoder of channels-first images in [-1, 1].

    Attributes:
        channels: Number of latent channels C.
        factor: Side of the block of pixels that one latent pixel represents.
    """

    channels: int
    factor: int

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @abstractmethod
    def encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Encode images (B, 3, H, W) as latents (B, C, H / factor, W / factor).

        The result is the mean of the encoder's distribution, or a sample from it if a generator is given.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, h factor, w factor), not clamped."""


class PixelCodec(ImageCodec):
    """Codec of pixel-space models: the latents are the images."""

    channels = 3
    factor = 1

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The images, unchanged."""
        return x

    def decode(self, latents: Tensor) -> Tensor:
        """The latents, unchanged."""
        return latents


class Autoencoder(FrozenNetwork, ImageCodec):
    """The autoencoder of a latent model: latents = (encoded - shift) * scale.

    Scale and shift are the autoencoder's ``scaling_factor`` and ``shift_factor``. Where it states ``latents_mean`` and
    ``latents_std``, the shift of each channel is its mean, and its scale is divided by its standard deviation. The
    network computes in its own precision, outside of autocast; images and latents keep the caller's data type.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        """Args:
        network: A diffusers autoencoder, e.g. AutoencoderKL or AutoencoderTiny.
        precision: Numerical precision of the network.
        """
        super().__init__(network, precision)
        config = self.network.config
        self.channels, self.factor = self._sizes(config)
        scale, shift = float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        normalized = mean is not None and std is not None
        self._scale = scale / torch.tensor(std) if normalized else torch.tensor([scale])
        self._shift = torch.tensor(mean if normalized else [shift])

    @staticmethod
    def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
        """Number of channels and reduction factor."""
        widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
        return config["latent_channels"], 2 ** (len(widths) - 1)

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The encoder's mean, or a sample if ``generator`` is given; deterministic autoencoders ignore it."""
        with torch.autocast(x.device.type, enabled=False):
            encoded = self.network.encode(x.to(self.dtype))
        if not hasattr(encoded, "latent_dist"):
            latents = encoded[0]
        elif generator is None:
            latents = encoded.latent_dist.mode()
        else:
            latents = _sampled(encoded.latent_dist, generator)
        latents = latents.to(x.dtype)
        return (latents - _per_channel(self._shift, latents)) * _per_channel(self._scale, latents)

    def decode(self, latents: Tensor) -> Tensor:
        """The images decoded from latents that are scaled and shifted as in the denoiser's input."""
        with torch.autocast(latents.device.type, enabled=False):
            encoded = latents / _per_channel(self._scale, latents) + _per_channel(self._shift, latents)
            return self.network.decode(encoded.to(self.dtype)).sample


class VideoAutoencoder(Autoencoder):
    """The autoencoder of Qwen-Image, for videos (B, C, T, H, W), of which images are the first frame.

    Its decoder clamps images to [-1, 1].
    """

    @staticmethod
    def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
        return config["z_dim"], 2 ** len(config["temperal_downsample"])

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The latents of one frame; see :meth:`Autoencoder.encode`."""
        return super().encode(x[:, :, None], generator)[:, :, 0]

    def decode(self, latents: Tensor) -> Tensor:
        """The image of one frame; see :meth:`Autoencoder.decode`."""
        return super().decode(latents[:, :, None])[:, :, 0]


class PatchAutoencoder(Autoencoder):
    """The autoencoder of FLUX.2, with patches of encoded pixels as latent pixels.

    Each of the channels of a patch is normalized by the statistics of the autoencoder's batch normalization.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        """The arguments are those of :class:`Autoencoder`."""
        super().__init__(network, precision)
        statistics, epsilon = self.network.bn, self.network.config.batch_norm_eps
        self._mean = statistics.running_mean.float()
        self._std = (statistics.running_var.float() + epsilon).sqrt()

    @staticmethod
    def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
        channels, factor = Autoencoder._sizes(config)
        side = config["patch_size"][0]
        return channels * side**2, factor * side

    def encode(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The normalized patches; see :meth:`Autoencoder.encode`."""
        latents = functional.pixel_unshuffle(super().encode(x, generator), self.network.config.patch_size[0])
        return (latents - _per_channel(self._mean, latents)) / _per_channel(self._std, latents)

    def decode(self, latents: Tensor) -> Tensor:
        """The images of normalized patches; see :meth:`Autoencoder.decode`."""
        patches = latents * _per_channel(self._std, latents) + _per_channel(self._mean, latents)
        return super().decode(functional.pixel_shuffle(patches, self.network.config.patch_size[0]))


_KINDS = {"AutoencoderKLQwenImage": VideoAutoencoder, "AutoencoderKLFlux2": PatchAutoencoder}
"""Autoencoders of diffusers with latents in another layout."""


def load_codec(source: PipelineSource, precision: Precision, *, upcasts: bool = False) -> ImageCodec:
    """The pipeline's autoencoder, or the pixel codec for a pipeline without ``vae``.

    Args:
        source: The pipeline.
        precision: Numerical precision of the autoencoder.
        upcasts: Keep an autoencoder with ``force_upcast`` in its configuration in float32 instead of float16.

    Raises:
        PriorError: The autoencoder's files are missing or incomplete.
    """
    if not source.has("vae"):
        return PixelCodec()
    source = source.vae or source
    if upcasts and precision in ("auto", "fp16") and source.network_config("vae").get("force_upcast", True):
        precision = "fp32"
    kind = _KINDS.get(source.index["vae"][1], Autoencoder)
    return kind(source.load_network("vae", loading_dtype(precision)), precision)


def open_autoencoder(name: str, source: PipelineSource) -> PipelineSource:
    """The source of another autoencoder for a pipeline.

    Args:
        name: The folder or hub id of an autoencoder or of a pipeline with one.
        source: The pipeline.

    Raises:
        PriorError: There is no such autoencoder, or its latents are not those of the pipeline's own.
    """
    if not source.has("vae"):
        raise PriorError(f"{VAE_KEY}: {source.name} is a model of pixels without an autoencoder; remove the option")
    other = PipelineSource.open_part(name, "vae", VAE_KEY, allow_pickle=source.allow_pickle)
    wanted, found = (_layout(each) for each in (source, other))
    if found != wanted:
        raise PriorError(
            f"{VAE_KEY}: {name} has {found[0]} latent channels for each {found[1]} pixels, and {source.name} has "
            f"{wanted[0]} for each {wanted[1]}; use an autoencoder of the same family"
        )
    return other


def _layout(source: PipelineSource) -> tuple[int, int]:
    """Number of latent channels and reduction factor, by the configuration of the autoencoder."""
    with source.using("the vae", "used"):
        config = source.network_config("vae")
        return _KINDS.get(source.index["vae"][1], Autoencoder)._sizes(config)


def resize_shorter_side(images: Tensor, side: int, multiple: int) -> Tensor:
    """(B, C, H, W) images resized so that the shorter side is about ``side`` and both sides are multiples of
    ``multiple``; images of that size are returned unchanged.
    """
    height, width = images.shape[-2:]
    ratio = side / min(height, width)
    size = tuple(max(1, round(length * ratio / multiple)) * multiple for length in (height, width))
    if size == (height, width):
        return images
    return functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=ratio < 1.0)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Values of all or of each of the channels (B, C, ...) of ``like``, to be multiplied with it."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 2))


def _sampled(distribution: Any, generator: torch.Generator) -> Tensor:
    """A sample from the encoder's Gaussian distribution; the noise is drawn on the generator's device."""
    mean = distribution.mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
    return mean + distribution.std * noise
