"""Stage of the flow prior: the joint transformer and its two text encoders, trained jointly from scratch.

The loss is the unweighted error of the velocity (rectified flow, arXiv 2403.03206). Timesteps are logit-normal and
shifted as in the model's sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors.stable_diffusion_3 import joint_embedding, with_camera_token

from .acceleration import GradientStep, accelerate
from .common import Ema, Stage, build_optimizer
from .pool import DenoiserBatch, Pool

UNIFORM_SHARE = 0.1
"""Share of uniform timesteps.

Logit-normal timesteps alone hardly train the noisiest end, where samplers begin."""
T5_TOKENS = 255
"""Zero tokens that a call of StableDiffusion3Pipeline with its defaults adds beside the camera token."""


class BatchSource(Protocol):
    """A source of training batches, such as a pool of rendered views."""

    def random_batch(self, count: int, generator: torch.Generator) -> DenoiserBatch:
        """Random examples; captions and cameras are dropped as the source specifies."""

    def refresh(self, filling: int) -> None:
        """Replace the content by new examples."""


class LetteredViews:
    """The views of the lettered objects of a pool, which the pool's own batches leave out.

    Refreshing the pool refreshes them.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def random_batch(self, count: int, generator: torch.Generator) -> DenoiserBatch:
        """Random lettered views; captions and cameras are dropped as in the pool's own batches."""
        first, end = self.pool.count_of_objects, self.pool.count
        index = torch.randint(first, end, (count,), generator=generator, device=self.pool.device)
        return self.pool.random_batch(count, generator, index=index)

    def refresh(self, filling: int) -> None:
        """Nothing: the pool is a source of its own."""


Sources = Sequence[tuple[BatchSource, float]]
"""Sources of batches and their shares of each batch, which sum to 1."""


class FlowModel(nn.Module):
    """Transformer and both text encoders as one trainable module."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        clip: CLIPTextModelWithProjection,
        clip_2: CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        self.transformer, self.clip, self.clip_2 = transformer, clip, clip_2

    def forward(self, x_t: Tensor, timestep: Tensor, token_ids: Tensor, camera: Tensor, t5_tokens: int = 0) -> Tensor:
        """The velocity (B, C, h, w).

        Args:
            x_t: Noisy latents (B, C, h, w).
            timestep: Timestep input of the transformer, (B,) in [0, 1000].
            token_ids: Token ids of the captions, (B, L), for both text encoders.
            camera: Camera embeddings (B, 16), zeros without a camera.
            t5_tokens: Number of zero context tokens in place of a T5 encoder's.
        """
        outputs = [encoder(input_ids=token_ids, output_hidden_states=True) for encoder in (self.clip, self.clip_2)]
        width = self.transformer.config.joint_attention_dim
        context, pooled = joint_embedding(outputs, width)
        context = torch.cat([context, context.new_zeros(len(context), t5_tokens, width)], dim=1)
        context = with_camera_token(context, camera)
        output: Tensor = self.transformer(x_t, context, pooled, timestep, return_dict=False)[0]
        return output


def mixed_batch(sources: Sources, count: int, generator: torch.Generator) -> DenoiserBatch:
    """``count`` examples, of which each source gives its share, rounded; the first source gives the rest.

    Captions of different lengths cannot be mixed: all sources use the same tokenizer.
    """
    counts = [round(share * count) for _, share in sources[1:]]
    counts.insert(0, count - sum(counts))
    parts = [source.random_batch(n, generator) for (source, _), n in zip(sources, counts, strict=True) if n > 0]
    return DenoiserBatch(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.camera for part in parts]),
    )


def random_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) in (0, 1) before the shift: logit-normal, and uniform for ``UNIFORM_SHARE`` of them."""
    device = generator.device
    normal = torch.randn(count, generator=generator, device=device).sigmoid()
    chance, uniform = torch.rand(2, count, generator=generator, device=device)
    return torch.where(chance < UNIFORM_SHARE, uniform, normal)


@torch.no_grad()
def standardize(vae: AutoencoderKL, images: Tensor) -> None:
    """Set ``scaling_factor`` and ``shift_factor`` so that latents have mean 0 and standard deviation 1.

    Args:
        vae: The trained autoencoder.
        images: Images (B, 3, H, W) in [0, 1].
    """
    codes = torch.cat([vae.encode(2.0 * chunk - 1.0).latent_dist.mean.float() for chunk in images.split(64)])
    mean, deviation = float(codes.mean()), float(codes.std())
    vae.register_to_config(scaling_factor=round(1.0 / deviation, 5), shift_factor=round(mean, 5))


def train_flow(
    model: FlowModel,
    sources: Sources,
    *,
    shift: float,
    offset: float,
    steps: int,
    batch: int,
    work: Path,
    generator: torch.Generator,
    compile_: bool,
    refreshes: int = 0,
    minutes: float = 0.0,
    peak_lr: float = 1e-3,
    hold: float = 0.5,
    ema_decay: float = 0.999,
    long_share: float = 0.1,
) -> FlowModel:
    """Train the model and return its averaged weights; the last saved state in ``work`` is resumed.

    Args:
        model: The untrained model, which is moved to the device of ``generator``.
        sources: Sources of batches with their shares.
        shift: Timestep shift of training and sampling.
        offset: Subtracted from the latents of all sources, which are scaled by the autoencoder's ``scaling_factor`` but
            not shifted: ``shift_factor * scaling_factor``.
        steps: Number of steps.
        batch: Size of a batch.
        work: Folder of the state file.
        generator: Source of all randomness.
        compile_: Whether to compile the transformer blocks.
        refreshes: How often the sources are refilled, at equal distances.
        minutes: If positive, the number of steps is set so that the training takes that time.
        peak_lr: Highest learning rate.
        hold: Fraction of the steps after which the learning rate decays; 1 for a constant one.
        ema_decay: Decay of the averaged weights.
        long_share: Share of the batches with the context length of a default call of StableDiffusion3Pipeline, so that
            the model can be sampled there, too.
    """
    device = generator.device
    stage = _stage(model, steps, work, generator, peak_lr, ema_decay)
    stage.hold, stage.minutes = hold, minutes
    stage.resume(device)
    accelerate(model, compile_=compile_)
    short, full = (
        GradientStep(loss_function(model, FlowSchedule(shift), tokens), stage.parameters(), device)
        for tokens in (0, T5_TOKENS)
    )
    while stage.step < stage.total:
        if stage.refill_is_due(refreshes):
            for source, _ in sources:
                source.refresh(stage.step)
        stage.set_lr()
        sample = mixed_batch(sources, batch, generator)
        noise = torch.randn(sample.latents.shape, generator=generator, device=device)
        t = random_timesteps(batch, generator)
        # The positions of long batches depend on the step alone, so that resumed stages repeat them.
        long = (stage.step + 1) * long_share % 1.0 < long_share
        step = full if long else short
        loss = step(sample.latents - offset, noise, t, sample.token_ids, sample.camera)
        stage.descend(loss, batch=batch, log_every=max(1, steps // 50))
    averaged: FlowModel = stage.emas["flow"].module
    return averaged


def loss_function(model: FlowModel, schedule: FlowSchedule, t5_tokens: int) -> Callable[..., Tensor]:
    """The mean squared error of the velocity, a function of latents, noise, timesteps, token ids and cameras."""

    def loss_of(z: Tensor, noise: Tensor, t: Tensor, token_ids: Tensor, camera: Tensor) -> Tensor:
        x_t = schedule.add_noise(z, noise, t)
        velocity = model(x_t, schedule.model_timestep(t), token_ids, camera, t5_tokens)
        return (velocity.float() - schedule.velocity(z, noise, t)).square().mean()

    return loss_of


def _stage(
    model: FlowModel, steps: int, work: Path, generator: torch.Generator, peak_lr: float, ema_decay: float
) -> Stage:
    """The training loop of a flow model, which is moved to the generator's device."""
    device = generator.device
    model.to(device)
    optimizer = build_optimizer(model, peak_lr, weight_decay=0.01)
    emas = {"flow": Ema(model, ema_decay)}
    warmup = min(500, steps // 5)
    return Stage("flow", {"flow": model}, optimizer, emas, steps, work, peak_lr, generator, warmup=warmup)
