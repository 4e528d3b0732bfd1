"""Stage 3: the denoiser and its text encoder, trained jointly from scratch.

The network predicts the clean latents z, with standard deviation s, at uniform timesteps. The squared error of the best
linear prediction is s^2 sigma^2 / (alpha^2 s^2 + sigma^2). The inverse of it is the weight of EDM (arXiv 2206.00364),
with which all timesteps count the same; the weight of the v-prediction is 1 / sigma^2, which hardly trains the last
timesteps, where text has the largest effect. The loss is weighted by the geometric mean of the two. It is limited for
sigma < s / sqrt(2), where it would grow without bound.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from .acceleration import GradientStep, accelerate
from .common import Ema, Stage, build_optimizer
from .models import LATENT_STD, build_scheduler
from .pool import Pool


class Denoiser(nn.Module):
    """U-Net and text encoder as one trainable module."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x_t: Tensor, t: Tensor, token_ids: Tensor, camera: Tensor) -> Tensor:
        """Predicted clean latents (B, C, h, w) of noisy ones, for timesteps (B,), token ids (B, L), cameras (B, 16)."""
        text = self.text_encoder(input_ids=token_ids).last_hidden_state
        output: Tensor = self.unet(x_t, t, encoder_hidden_states=text, class_labels=camera, return_dict=False)[0]
        return output


def loss_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight of the squared error of the clean latents; see the documentation of this module."""
    total = ((alpha * LATENT_STD).square() + sigma.square()).sqrt()
    return total / LATENT_STD / sigma.square().clamp_min(LATENT_STD**2 / 2)


def train_denoiser(
    denoiser: Denoiser,
    pool: Pool,
    *,
    steps: int,
    batch: int,
    work: Path,
    generator: torch.Generator,
    compile_: bool,
    refreshes: int,
    minutes: float = 0.0,
    peak_lr: float = 1e-3,
    hold: float = 0.5,
    ema_decay: float = 0.999,
) -> Denoiser:
    """Train the denoiser and return its averaged weights; the pool is refreshed ``refreshes`` times.

    With ``minutes``, the number of steps is set so that the training takes that time. The learning rate rises to
    ``peak_lr`` and decays after the fraction ``hold`` of the steps.
    """
    device = pool.device
    stage = _stage(denoiser, steps, work, generator, device, ema_decay, peak_lr)
    stage.hold, stage.minutes = hold, minutes
    stage.resume(device)
    alphas_bar = build_scheduler().alphas_cumprod.to(device)

    def loss_of(z: Tensor, noise: Tensor, t: Tensor, token_ids: Tensor, camera: Tensor) -> Tensor:
        alpha = alphas_bar[t].sqrt()[:, None, None, None]
        sigma = (1 - alphas_bar[t]).sqrt()[:, None, None, None]
        prediction = denoiser(alpha * z + sigma * noise, t, token_ids, camera)
        return (loss_weight(alpha, sigma) * (prediction.float() - z).square()).mean()

    accelerate(denoiser, compile_=compile_)
    step = GradientStep(loss_of, stage.parameters(), device)
    while stage.step < stage.total:
        if stage.refill_is_due(refreshes):
            pool.refresh(stage.step)
        stage.set_lr()
        sample = pool.random_batch(batch, generator)
        noise = torch.randn(sample.latents.shape, generator=generator, device=device)
        t = torch.randint(0, 1000, (batch,), generator=generator, device=device)
        loss = step(sample.latents, noise, t, sample.token_ids, sample.camera)
        stage.descend(loss, batch=batch, log_every=max(1, steps // 50))
    averaged: Denoiser = stage.emas["denoiser"].module
    return averaged


def _stage(
    denoiser: Denoiser,
    steps: int,
    work: Path,
    generator: torch.Generator,
    device: torch.device,
    ema_decay: float,
    peak_lr: float,
) -> Stage:
    """The training loop of a denoiser, which is moved to the device."""
    denoiser.to(device)
    optimizer = build_optimizer(denoiser, peak_lr, weight_decay=0.01)
    return Stage(
        "denoiser",
        {"denoiser": denoiser},
        optimizer,
        {"denoiser": Ema(denoiser, ema_decay)},
        steps,
        work,
        peak_lr,
        generator,
        warmup=min(300, steps // 5),
    )
