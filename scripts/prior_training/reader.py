"""Stage of the reader: it is trained on renders of signs and mugs with training words, and tested on held-out words."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.procedural.lettering import lettering_cameras, render_lettered, sample_lettered
from scoredist3d.procedural.reader import READER_SIZE, Reader, character_accuracy, exact_match

from .common import Ema, Stage, build_optimizer
from .compositing import composite, random_backgrounds, straight_alpha
from .parts import Renderer

PEAK_LR = 2e-3


class LetteredPool:
    """Renders of random signs and mugs with their words.

    Args:
        count: Number of images.
        image_size: Width and height of the images in pixels.
        antialias: Rays per pixel along each axis.
        seed: Seed; each call of :meth:`fill` derives its own from it.
        device: Device for rendering and storage.
        held_out: Whether the words are held-out words.
        compile_: Whether to compile the ray caster.
    """

    def __init__(
        self,
        count: int,
        *,
        image_size: int = READER_SIZE,
        antialias: int = 2,
        seed: int,
        device: torch.device,
        held_out: bool = False,
        compile_: bool = False,
    ) -> None:
        self.count, self.image_size, self.seed, self.device, self.held_out = count, image_size, seed, device, held_out
        self._renderer = Renderer(image_size, antialias, device, compile_)
        self.rgba = torch.zeros(count, image_size, image_size, 4, dtype=torch.uint8, device=device)
        self.words: tuple[str, ...] = ()

    @torch.no_grad()
    def fill(self, filling: int) -> None:
        """Replace the content by renders of new objects."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1000 + filling)
        lettered = sample_lettered(self.count, generator, self.device, held_out=self.held_out)
        cameras = lettering_cameras(lettered, self.image_size, generator)
        self.rgba = self._renderer(lettered, cameras, render_lettered)
        self.words = lettered.words

    def rgba_at(self, index: Tensor) -> Tensor:
        """Straight-alpha images (B, 4, H, W) in [0, 1] of the renders at ``index``."""
        return straight_alpha(self.rgba[index])


def soften(image: Tensor, generator: torch.Generator) -> Tensor:
    """Degrade images (B, 3, H, W) as a prior may: Gaussian blur of a standard deviation up to 1.2 pixels, and noise.

    Half of the images are blurred, half have noise of a standard deviation up to 0.1, and all change their contrast and
    brightness slightly.
    """
    count, device = len(image), image.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator, device=device)

    sigma = uniform(0.3, 1.2)
    offsets = torch.arange(-3, 4, device=device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())  # (B, 1, 1, 7)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).repeat_interleave(3, 0)
    flat = image.flatten(0, 1)[None]
    groups = flat.shape[1]
    blurred = functional.conv2d(functional.pad(flat, (3, 3, 0, 0), mode="replicate"), kernel, groups=groups)
    blurred = functional.conv2d(
        functional.pad(blurred, (0, 0, 3, 3), mode="replicate"), kernel.transpose(2, 3), groups=groups
    )
    image = torch.where(uniform(0, 1) < 0.5, blurred.view_as(image), image)
    image = (image - 0.5) * uniform(0.8, 1.2) + 0.5 + uniform(-0.08, 0.08)
    noise_std = uniform(0.0, 0.1) * (uniform(0, 1) < 0.5)
    return (image + noise_std * torch.randn(image.shape, generator=generator, device=device)).clamp(0, 1)


def shifted(image: Tensor, generator: torch.Generator, *, pixels: float = 5.0, zoom: float = 0.08) -> Tensor:
    """Move images (B, 3, H, W) by up to ``pixels`` and scale them by up to ``zoom``; the border is repeated."""
    count, device = len(image), image.device
    unit = 2 * torch.rand(3, count, generator=generator, device=device) - 1
    scale = torch.exp(math.log1p(zoom) * unit[0])
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = (2 * pixels / image.shape[-1]) * unit[1:].T
    grid = functional.affine_grid(theta, list(image.shape), align_corners=False)
    return functional.grid_sample(image, grid, padding_mode="border", align_corners=False)


def train_reader(
    pool: LetteredPool,
    *,
    steps: int,
    batch: int,
    work: Path,
    generator: torch.Generator,
    width: int = 24,
    refill_every: int = 2000,
) -> Reader:
    """Train the reader and return its averaged weights.

    Args:
        pool: Renders; they are replaced every ``refill_every`` steps.
        steps: Number of steps.
        batch: Images per step.
        work: Folder of the state file.
        generator: Source of batches and degradations.
        width: Channels of the first stage of the network.
        refill_every: Steps between two fillings of the pool.
    """
    device = pool.device
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())  # library modules draw their initial weights from the global stream
        reader = Reader(width=width).to(device)
    optimizer = build_optimizer(reader, PEAK_LR, weight_decay=0.02)
    ema = Ema(reader, 0.998)
    warmup = min(200, max(1, steps // 5))
    stage = Stage("reader", {"reader": reader}, optimizer, {"reader": ema}, steps, work, PEAK_LR, generator, warmup)
    stage.resume(device)
    filling = -1
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    while stage.step < stage.total:
        if stage.step // refill_every != filling:
            filling = stage.step // refill_every
            pool.fill(filling)
        stage.set_lr()
        index = torch.randint(0, pool.count, (batch,), generator=generator, device=device)
        background = random_backgrounds(batch, generator, device, white=0.4, gray=0.4)
        with torch.no_grad():
            image = soften(shifted(composite(pool.rgba_at(index), background), generator), generator)
        reader.zero_grad()
        with amp:
            loss = reader.loss(image.movedim(1, -1), [pool.words[k] for k in index.tolist()]).mean()
        loss.backward()
        stage.descend(loss.detach(), batch=batch, log_every=max(1, steps // 20))
    averaged: Reader = ema.module
    return averaged


@torch.no_grad()
def evaluate_reader(reader: Reader, pool: LetteredPool, *, degraded: bool, seed: int = 0) -> dict[str, float]:
    """Exact match and character accuracy on the renders of a filled pool, over random backgrounds."""
    generator = torch.Generator(pool.device).manual_seed(seed)
    read: list[str] = []
    for start in range(0, pool.count, 256):
        index = torch.arange(start, min(start + 256, pool.count), device=pool.device)
        background = random_backgrounds(len(index), generator, pool.device, white=0.5, gray=0.5)
        image = composite(pool.rgba_at(index), background)
        read += reader.read((soften(image, generator) if degraded else image).movedim(1, -1))
    return {"exact": exact_match(read, pool.words), "characters": character_accuracy(read, pool.words)}
