"""Stage 1: the autoencoder.

40 % of its images have colored backgrounds, and some are blurred, noisy or half-transparent. In the early steps of a
distillation the renders are fog and soft blobs, later they have speckle, and the gradient of the encoder must be useful
for all of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from .acceleration import GradientStep, accelerate
from .common import Ema, Stage, build_optimizer
from .compositing import composite, random_backgrounds
from .models import LATENT_STD, reconstruct
from .pool import Pool
from .spectrum import band_noise, gains

_PEAK_LR = 1.2e-3
_FINE_BANDS: tuple[tuple[tuple[float, float], float], ...] = (
    ((0.06, 0.12), 1.2),
    ((0.12, 0.18), 1.0),
    ((0.18, 0.25), 0.8),
    ((0.25, 0.35), 0.6),
    ((0.35, 0.5), 0.5),
)
"""Bands of spatial frequency, in cycles per pixel, and the gain of the encoder that is enforced in each of them.

The gain is the norm of the change of the latents, divided by their standard deviation, per norm of the change of the
image. It is about 1.5 for coarse structure without any enforcement."""
_PROBE_STD = 0.03  # standard deviation of the perturbation, for images in [0, 1]


def augmented_batch(pool: Pool, count: int, generator: torch.Generator) -> Tensor:
    """Augmented images (count, 3, H, W) in [-1, 1].

    Backgrounds are white, gray or colored; 20 % of the objects are half-transparent, 15 % of the images are blurred,
    and 12 % are noisy. 20 % are renders at 3/8 to 3/4 of the size, enlarged, as distillation makes them to save time.
    """
    rgba = pool.rgba_at(pool.random_index(count, generator, lettered=True))
    device = rgba.device

    def chance(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator, device=device) < share

    background = random_backgrounds(count, generator, device, white=0.35, gray=0.25)
    opacity = torch.rand(count, 1, 1, 1, generator=generator, device=device)
    image = composite(rgba, background, torch.where(chance(0.2), opacity, 1.0))
    small = functional.avg_pool2d(image, 8)
    soft = functional.interpolate(small, image.shape[-2:], mode="bilinear", align_corners=False)
    image = torch.where(chance(0.15), soft, image)
    size = image.shape[-1]
    enlarged = torch.cat([_resampled(part, size * (k + 3) // 8) for k, part in enumerate(image.chunk(4))])
    image = torch.where(chance(0.2), enlarged, image)
    std = 0.15 * torch.rand(count, 1, 1, 1, generator=generator, device=device) * chance(0.12)
    image = image + std * torch.randn(image.shape, generator=generator, device=device)
    return 2.0 * image.clamp(0, 1) - 1.0


def _resampled(image: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W), reduced to ``size`` pixels and enlarged again."""
    small = functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return functional.interpolate(small, image.shape[-2:], mode="bilinear")


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 + 8 MSE + 0.5 L1 of the image gradients + 0.25 L1 of the local contrast.

    The local contrast is the standard deviation over windows of 8x8 pixels. It makes the latents contain the amount of
    noise and fine texture, of which they cannot contain every pixel.
    """
    difference = prediction - target
    dx = difference[..., :, 1:] - difference[..., :, :-1]
    dy = difference[..., 1:, :] - difference[..., :-1, :]
    loss = difference.abs().mean() + 8 * difference.square().mean() + 0.5 * (dx.abs().mean() + dy.abs().mean())
    return loss + 0.25 * (_contrast(prediction) - _contrast(target)).abs().mean()


def _contrast(image: Tensor) -> Tensor:
    mean = functional.avg_pool2d(image, 8, stride=4)
    square = functional.avg_pool2d(image.square(), 8, stride=4)
    return (square - mean.square()).clamp_min(1e-5).sqrt()


class AutoencoderLoss:
    """Loss of the autoencoder: reconstruction at two sizes, KL divergence, and the answer to fine detail.

    A quarter of the batch is also decoded from latents of half the size to an image of half the size, which keeps the
    latents smooth, so that a small denoiser can model them (equivariance regularization, arXiv 2502.09509). The same
    quarter is encoded again with band-limited noise, to which the latents must answer with the gains of
    ``_FINE_BANDS``; without this, an encoder hardly answers to detail that is finer than five pixels.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    def __call__(self, image: Tensor, noise: Tensor, perturbation: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            image: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w), standard normal noise of the latents.
            perturbation: (B/4, 3, H, W), change of the first images.
            target: Scalar, gain that the encoder must reach for the perturbation.
        """
        vae, quarter = self.vae, len(perturbation)
        posterior = vae.encode(image).latent_dist
        # A small constant noise keeps the decoder smooth in latent space; a KL weight alone does not at this size.
        z = posterior.mean + (posterior.std + 0.05) * noise
        loss = reconstruction_loss(vae.decode(z).sample.float(), image)
        kl = 0.5 * (posterior.mean.square() + posterior.var - posterior.logvar - 1).mean()
        coarse = vae.decode(functional.avg_pool2d(z[:quarter], 2)).sample.float()
        loss = loss + 0.1 * reconstruction_loss(coarse, functional.avg_pool2d(image[:quarter], 2))
        mean = posterior.mean[:quarter].float()
        moved = vae.encode(image[:quarter] + perturbation).latent_dist.mean.float()
        change = (moved - mean).flatten(1).norm(dim=1) / posterior.mean.float().std().detach()
        gain = 2.0 * change / perturbation.flatten(1).norm(dim=1)  # per change of an image in [0, 1]
        return loss + 2e-5 * kl + 0.05 * (1 - gain / target).clamp_min(0).square().mean()


def train_vae(
    vae: AutoencoderKL,
    pool: Pool,
    *,
    steps: int,
    batch: int,
    work: Path,
    generator: torch.Generator,
    minutes: float = 0.0,
) -> AutoencoderKL:
    """Train the autoencoder and return its averaged weights, with ``scaling_factor`` set."""
    device = pool.device
    vae.to(device)
    optimizer = build_optimizer(vae, _PEAK_LR, weight_decay=1e-4)
    emas = {"vae": Ema(vae, 0.998)}
    warmup = min(200, steps // 5)
    stage = Stage("vae", {"vae": vae}, optimizer, emas, steps, work, _PEAK_LR, generator, warmup=warmup)
    stage.minutes = minutes
    stage.resume(device)
    accelerate(vae)
    step = GradientStep(AutoencoderLoss(vae), stage.parameters(), device)
    size = pool.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    while stage.step < stage.total:
        stage.set_lr()
        image = augmented_batch(pool, batch, generator)
        noise = torch.randn(batch, vae.config.latent_channels, size, size, generator=generator, device=device)
        band, target = _FINE_BANDS[stage.step % len(_FINE_BANDS)]
        # Twice the standard deviation, because the images span [-1, 1].
        perturbation = band_noise(image[: max(1, batch // 4)].shape, band, 2 * _PROBE_STD, generator)
        loss = step(image, noise, perturbation, torch.tensor(target, device=device))
        stage.descend(loss, batch=batch, log_every=max(1, steps // 20))
    averaged: AutoencoderKL = stage.emas["vae"].module
    set_scaling_factor(averaged, pool, generator)
    return averaged


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, pool: Pool, generator: torch.Generator) -> None:
    """Set ``scaling_factor`` so that latents of the training images have the standard deviation :data:`LATENT_STD`."""
    images = pool.images_at(pool.random_index(min(2048, pool.count_of_objects), generator))
    codes = torch.cat([vae.encode(2.0 * chunk - 1.0).latent_dist.mean for chunk in images.split(256)])
    vae.register_to_config(scaling_factor=float(LATENT_STD / codes.float().std()))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pool: Pool, generator: torch.Generator, *, background: str) -> float:
    """Reconstruction PSNR in dB on ``white``, ``gray`` or ``rgb`` backgrounds, or of ``lettered`` objects on white."""
    lettered = background == "lettered"
    count = min(1024, pool.count - pool.count_of_objects if lettered else pool.count_of_objects)
    index = pool.random_index(count, generator)
    if lettered:
        index = torch.arange(pool.count_of_objects, pool.count_of_objects + count, device=pool.device)
    rgba = pool.rgba_at(index)
    shares = {"white": (1.0, 0.0), "gray": (0.0, 1.0), "rgb": (0.0, 0.0), "lettered": (1.0, 0.0)}[background]
    image = composite(rgba, random_backgrounds(count, generator, rgba.device, white=shares[0], gray=shares[1]))
    errors = []
    for chunk in image.split(256):
        errors.append((reconstruct(vae, chunk) - chunk).clamp(-1, 1).square().mean((1, 2, 3)))
    return float(-10 * torch.log10(torch.cat(errors).mean()))


@torch.no_grad()
def encoder_gains(vae: AutoencoderKL, pool: Pool, generator: torch.Generator) -> dict[str, dict[str, float]]:
    """Answer of the encoder to fine detail, by band of spatial frequency; see :func:`.spectrum.gains`."""
    images = pool.images_at(pool.random_index(min(256, pool.count_of_objects), generator))
    scale = vae.config.scaling_factor

    def encode(x: Tensor) -> Tensor:
        codes: Tensor = vae.encode(2.0 * x - 1.0).latent_dist.mean.float()
        return scale * codes

    def decode(z: Tensor) -> Tensor:
        output: Tensor = vae.decode(z / scale).sample.float()
        return 0.5 * (output + 1.0)

    return gains(encode, decode, images, generator)
