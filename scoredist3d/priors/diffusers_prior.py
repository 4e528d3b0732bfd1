"""Any Stable-Diffusion-shaped model: text encoder, UNet, scheduler and, for latent models, an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, option
from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.priors.base import AdapterPoints, Conditioning, Prediction, Prior
from scoredist3d.priors.camera_embedding import CAMERA_EMBEDDING_SIZE, camera_embedding
from scoredist3d.priors.diffusers_loading import EMBEDDED, MODEL_KEY, PipelineSource, PriorError
from scoredist3d.priors.text_encoding import cast_network, encode_text
from scoredist3d.priors.thresholding import SampleLimit
from scoredist3d.priors.unet_support import check_unet, text_width
from scoredist3d.registry import register

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@register("prior", "diffusers", summary="A Stable-Diffusion-shaped model from a diffusers folder or hub id.")
class DiffusersPrior(Prior):
    """UNet, text encoder and optional autoencoder of a diffusers pipeline.

    Stable Diffusion 1.x and 2.x and the first stage of DeepFloyd IF fit; other families are refused by name (see
    :func:`~scoredist3d.priors.unet_support.check_unet`).

    A pipeline without ``vae`` is a pixel model: its latents are channels-first images in [-1, 1]. A UNet with
    ``class_embed_type: projection`` and 16 inputs is conditioned on cameras (see
    :func:`~scoredist3d.priors.camera_embedding.camera_embedding`), and is told zeros where no camera is given.

    Latents, timesteps and predictions keep the caller's dtype; only the networks run in ``precision``, outside of
    autocast.
    """

    @dataclass
    class Config(ComponentConfig):
        """Which model, and how it runs."""

        pretrained_model_name_or_path: str = option(
            EMBEDDED,
            "A diffusers pipeline folder or hub id; 'embedded' is the small model that comes with the package.",
        )
        revision: str | None = option(None, "Branch, tag or commit of a hub id.")
        variant: str | None = option(None, "Weight files to prefer, e.g. fp16.")
        precision: Literal["auto", "fp32", "fp16", "bf16"] = option(
            "auto", "Arithmetic of the networks; auto is fp16 on CUDA and fp32 elsewhere (bf16 on a CPU is far slower)."
        )
        image_size: int | None = option(
            None, "Side of the images the denoiser sees, pixels; null takes the size it was trained on.", ge=8, le=4096
        )

    unet: Any
    text_encoder: Any
    tokenizer: Any
    vae: Any

    def __init__(self, config: Config, *, denoiser_only: bool = False) -> None:
        """Load the model on the CPU; move it with ``.to(device)``.

        Args:
            config: Which model.
            denoiser_only: Leave out what encodes texts and images; only :meth:`predict` works then.

        Raises:
            PriorError: The folder or hub id is missing, incomplete, or of a family that is not supported.
        """
        super().__init__()
        self.config = config
        source = PipelineSource.open(
            config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant
        )
        dtype = _DTYPES.get(config.precision, torch.float32)
        self.name = source.name
        self.takes_cameras = check_unet(source)
        scheduler = source.scheduler_config()
        self.schedule = NoiseSchedule.from_config(scheduler)
        # Limits on pixel values mean nothing for latents.
        self._sample_limit = None if source.has("vae") else SampleLimit.from_scheduler_config(scheduler)
        self.unet = source.load_network("unet", dtype)
        self.text_encoder = self.tokenizer = self.vae = None
        if not denoiser_only:
            self.text_encoder = source.load_network("text_encoder", dtype)
            self.tokenizer = source.load("tokenizer")
            self.vae = source.load_network("vae", dtype) if source.has("vae") else None
        channels = 3 if self.vae is None else self.vae.config.latent_channels
        if not denoiser_only and self.unet.config.in_channels != channels:
            raise PriorError(
                f"{MODEL_KEY}: the UNet of {source.name} takes {self.unet.config.in_channels} "
                f"channels, not the {channels} of plain text-to-image models; inpainting and editing models do not fit"
            )
        self.vocabulary = source.vocabulary()
        self._factor = 1 if self.vae is None else 2 ** (len(_stages(self.vae.config)) - 1)
        self._scale, self._shift = _latent_scaling(None if self.vae is None else self.vae.config)
        native: Any = self.unet.config.sample_size
        native = (native if isinstance(native, int) else native[0]) * self._factor
        self.image_size = config.image_size or native

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return self.unet.dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) by the UNet's channels and the autoencoder's reduction."""
        return (self.unet.config.in_channels, height // self._factor, width // self._factor)

    def encode(self, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Resize to the model's size, map to [-1, 1], encode and scale; see :meth:`Prior.encode`."""
        x = 2.0 * self._resized(rgb.movedim(-1, 1)) - 1.0
        if self.vae is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            encoded = self.vae.encode(x.to(self.dtype))
        if not hasattr(encoded, "latent_dist"):
            latents = encoded.latents
        elif generator is None:
            latents = encoded.latent_dist.mode()
        else:
            latents = _sampled(encoded.latent_dist, generator)
        return (latents.to(x.dtype) - self._shift) * self._scale

    def decode(self, latents: Tensor) -> Tensor:
        """Undo the scaling and decode."""
        x = latents
        if self.vae is not None:
            with torch.autocast(latents.device.type, enabled=False):
                x = self.vae.decode((latents / self._scale + self._shift).to(self.dtype)).sample
        return (0.5 * x.to(latents.dtype) + 0.5).movedim(1, -1)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], cameras: Cameras | None = None) -> Conditioning:
        """The text encoder's last hidden state, and the camera where the model takes one; see
        :func:`~scoredist3d.priors.text_encoding.encode_text`.

        Raises:
            ValueError: Not one camera per prompt.
        """
        if cameras is not None and len(cameras) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many cameras, got {len(cameras)}")
        text = encode_text(self.tokenizer, self.text_encoder, prompts)
        return Conditioning(text=text, camera=self.camera_condition(cameras, len(prompts)))

    def camera_condition(self, cameras: Cameras | None, batch: int) -> Tensor | None:
        """Flattened camera matrices; zeros without cameras; None for a model without a camera embedding."""
        if not self.takes_cameras:
            return None
        if cameras is None:
            return torch.zeros(batch, CAMERA_EMBEDDING_SIZE, device=self.device)
        return camera_embedding(cameras).to(self.device)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """One UNet call.

        Raises:
            ValueError: The model takes cameras and the conditioning has none.
        """
        if self.takes_cameras and conditioning.camera is None:
            raise ValueError(f"{self.name} is conditioned on cameras; make the conditioning with prior.embed")
        camera = conditioning.camera.to(self.dtype) if conditioning.camera is not None else None
        with torch.autocast(x_t.device.type, enabled=False):
            output = self.unet(
                x_t.to(self.dtype),
                self.schedule.model_timestep(t),
                encoder_hidden_states=conditioning.text.to(self.dtype),
                class_labels=camera,
                return_dict=False,
            )[0]
        # Models that also predict a variance (DeepFloyd) return it as further channels.
        output = output[:, : x_t.shape[1]].to(x_t.dtype)
        return Prediction(output, self.schedule.prediction_type, x_t, t, self.schedule)

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the timestep embedding."""
        names = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")  # the last two in DeepFloyd IF
        linears = tuple(path for path, _ in self.unet.named_modules() if path.endswith(names))
        width = self.unet.time_embedding.linear_2.out_features
        return AdapterPoints(self.unet, linears, "time_embedding", width, text_width(self.unet.config))

    def limit_x0(self, x0: Tensor) -> Tensor:
        """Apply the thresholding that the scheduler's configuration asks for, in pixel models."""
        return x0 if self._sample_limit is None else self._sample_limit(x0)

    def _resized(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the model's size: the shorter side becomes ``image_size``, both multiples of the latent
        pixel.
        """
        height, width = images.shape[-2:]
        ratio = self.image_size / min(height, width)
        size = tuple(max(1, round(side * ratio / self._factor)) * self._factor for side in (height, width))
        if size == (height, width):
            return images
        return functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=ratio < 1.0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Follow ``.to(device)``, also a parent module's, with the precision that suits the device."""
        super()._apply(fn, recurse)
        if self.config.precision == "auto":
            dtype = torch.float16 if self.device.type == "cuda" else torch.float32
            for network in (self.unet, self.text_encoder, self.vae):
                if network is not None and network.dtype != dtype:
                    cast_network(network, dtype)
        return self


def _stages(config: Any) -> Sequence[int]:
    """Widths per resolution of an autoencoder."""
    return config.get("block_out_channels") or config["encoder_block_out_channels"]


def _latent_scaling(config: Any) -> tuple[float, float]:
    """(scale, shift) of latents = (encoded - shift) * scale."""
    if config is None:
        return 1.0, 0.0
    return float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0)


def _sampled(distribution: Any, generator: torch.Generator) -> Tensor:
    """A draw from the encoder's Gaussian, the noise made on the generator's device."""
    mean = distribution.mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
    return mean + distribution.std * noise
