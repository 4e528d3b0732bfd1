"""Stage 1: the autoencoder.

40 % of its images have colored backgrounds, and some are blurred or half-transparent. In the early steps of a
distillation the renders are fog and soft blobs, and the gradient of the encoder must be useful for them too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from .common import Ema, Stage
from .models import LATENT_STD
from .pool import Pool, composite, random_backgrounds


def augmented_batch(pool: Pool, count: int, generator: torch.Generator) -> Tensor:
    """Augmented images (count, 3, H, W) in [-1, 1].

    Backgrounds are white, gray or colored; 20 % of the objects are half-transparent and 15 % of the images are blurred.
    """
    rgba = pool.random_rgba(count, generator)
    device = rgba.device
    background = random_backgrounds(count, generator, device, white=0.35, gray=0.25)
    faded = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.2
    opacity = torch.where(faded, torch.rand(count, 1, 1, 1, generator=generator, device=device), 1.0)
    image = composite(rgba, background, opacity)
    blur = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.15
    small = functional.avg_pool2d(image, 4)
    soft = functional.interpolate(small, image.shape[-2:], mode="bilinear", align_corners=False)
    return 2.0 * torch.where(blur, soft, image) - 1.0


def reconstruction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 + 0.5 MSE + 0.5 L1 of the image gradients."""
    difference = prediction - target
    dx = difference[..., :, 1:] - difference[..., :, :-1]
    dy = difference[..., 1:, :] - difference[..., :-1, :]
    return difference.abs().mean() + 0.5 * difference.square().mean() + 0.5 * (dx.abs().mean() + dy.abs().mean())


def train_vae(
    vae: AutoencoderKL, pool: Pool, *, steps: int, batch: int, work: Path, generator: torch.Generator, compile_: bool
) -> AutoencoderKL:
    """Train the autoencoder and return its averaged weights, with ``scaling_factor`` set."""
    device = pool.device
    vae.to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    stage = Stage(
        "vae",
        {"vae": vae},
        optimizer,
        {"vae": Ema(vae, 0.998)},
        steps,
        work,
        1.5e-3,
        generator,
        warmup=min(200, steps // 5),
    )
    stage.resume(device)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def loss_of(image: Tensor, noise: Tensor) -> Tensor:
        posterior = vae.encode(image).latent_dist
        # A small constant noise keeps the decoder smooth in latent space; a KL weight alone does not at this size.
        reconstruction = vae.decode(posterior.mean + (posterior.std + 0.05) * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - posterior.logvar - 1).mean()
        return reconstruction_loss(reconstruction.float(), image) + 2e-5 * kl

    step_loss = torch.compile(loss_of) if compile_ else loss_of
    size = pool.image_size // 4
    while stage.step < stage.total:
        stage.set_lr()
        image = augmented_batch(pool, batch, generator)
        noise = torch.randn(batch, vae.config.latent_channels, size, size, generator=generator, device=device)
        with amp:
            loss = step_loss(image, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        stage.emas["vae"].update(vae)
        stage.advance(loss.detach(), batch=batch, log_every=max(1, steps // 20))
    averaged: AutoencoderKL = stage.emas["vae"].module
    set_scaling_factor(averaged, pool, generator)
    return averaged


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, pool: Pool, generator: torch.Generator) -> None:
    """Set ``scaling_factor`` so that latents of the training images have the standard deviation :data:`LATENT_STD`."""
    images = pool.random_images(min(2048, pool.count), generator)
    codes = torch.cat([vae.encode(2.0 * chunk - 1.0).latent_dist.mean for chunk in images.split(256)])
    vae.register_to_config(scaling_factor=float(LATENT_STD / codes.float().std()))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pool: Pool, generator: torch.Generator, *, background: str) -> float:
    """Reconstruction PSNR in dB on ``white``, ``gray`` or ``rgb`` backgrounds."""
    count = min(1024, pool.count)
    rgba = pool.random_rgba(count, generator)
    shares = {"white": (1.0, 0.0), "gray": (0.0, 1.0), "rgb": (0.0, 0.0)}[background]
    image = composite(rgba, random_backgrounds(count, generator, rgba.device, white=shares[0], gray=shares[1]))
    errors = []
    for chunk in image.split(256):
        output = vae.decode(vae.encode(2.0 * chunk - 1.0).latent_dist.mean).sample
        errors.append((0.5 * (output + 1) - chunk).clamp(-1, 1).square().mean((1, 2, 3)))
    return float(-10 * torch.log10(torch.cat(errors).mean()))
