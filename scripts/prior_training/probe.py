"""Stage 2: the probe, trained on real renders only and frozen before the denoiser is trained.

Half of the renders pass through the autoencoder, so that the probe does not depend on sharp details.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from scoredist3d.procedural import CATEGORIES, COLORS, PATTERNS
from scoredist3d.procedural.probe import Probe, ProbeReading

from .acceleration import GradientStep, accelerate
from .common import Ema, Stage, build_optimizer
from .compositing import composite, random_backgrounds
from .parts import Part
from .pool import Pool

_PEAK_LR = 2e-3
_SCENES = 0.35  # share of scenes of two objects in a batch


def probe_loss(reading: ProbeReading, views: Part, index: Tensor) -> Tensor:
    """Cross-entropies of the attributes, plus 1 - cos(k e) for the azimuth error e and the symmetry order k.

    Scenes of two objects train only the list of kinds that are present.
    """
    first, second = views.category[index], views.second_category[index]
    single = second < 0
    both = functional.one_hot(torch.stack([first, torch.where(single, first, second)]), len(CATEGORIES))
    present = both.amax(0).float()
    loss = 5.0 * functional.binary_cross_entropy_with_logits(reading.present.float(), present)
    for name, truth, weight in (
        ("category", first, 1.0),
        ("color", views.color[index], 1.0),
        ("second_color", views.second_color[index], 0.3),
        ("pattern", views.pattern[index], 0.5),
    ):
        loss = loss + weight * (functional.nll_loss(getattr(reading, name), truth, reduction="none") * single).mean()
    symmetry = views.symmetry[index]
    order = symmetry.clamp(1, 4)
    angle = order * views.azimuth[index]
    aim = torch.stack([angle.cos(), angle.sin()], -1)
    direction = reading.direction[torch.arange(len(order), device=order.device), order - 1]
    off = (1 - (direction * aim).sum(-1)) * (symmetry > 0)
    return loss + off.mean()


def corrupt(image: Tensor, generator: torch.Generator) -> Tensor:
    """Degrade some images by blur and noise, as distillation may."""
    device = image.device
    chance = torch.rand(2, len(image), 1, 1, 1, generator=generator, device=device)
    soft = functional.avg_pool2d(functional.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = torch.where(chance[0] < 0.3, soft, image)
    noise_std = 0.08 * torch.rand(len(image), 1, 1, 1, generator=generator, device=device) * (chance[1] < 0.5)
    return (image + noise_std * torch.randn(image.shape, generator=generator, device=device)).clamp(0, 1)


def train_probe(
    pool: Pool,
    vae: AutoencoderKL,
    *,
    steps: int,
    batch: int,
    work: Path,
    generator: torch.Generator,
    minutes: float = 0.0,
    width: int = 40,
) -> Probe:
    """Train the probe and return its averaged weights."""
    device = pool.device
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())  # library modules draw their initial weights from the global stream
        names = (CATEGORIES, COLORS, PATTERNS)
        probe = Probe(*names, width=width, input_size=pool.image_size, stem_stride=2, grid=4).to(device)
    optimizer = build_optimizer(probe, _PEAK_LR, weight_decay=0.02)
    emas = {"probe": Ema(probe, 0.998)}
    warmup = min(200, steps // 5)
    stage = Stage("probe", {"probe": probe}, optimizer, emas, steps, work, _PEAK_LR, generator, warmup=warmup)
    stage.minutes = minutes
    stage.resume(device)
    accelerate(probe)

    def loss_of(image: Tensor, index: Tensor) -> Tensor:
        return probe_loss(probe(image.movedim(1, -1)), pool.views, index)

    step = GradientStep(loss_of, stage.parameters(), device)
    encoded = pool.reconstructions(vae)
    while stage.step < stage.total:
        stage.set_lr()
        index = pool.random_index(batch, generator, scenes=_SCENES)
        background = random_backgrounds(batch, generator, device, white=0.4, gray=0.5)
        image = composite(pool.rgba_at(index), background)
        passed = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.5
        image = corrupt(torch.where(passed, encoded[index] / 255.0, image), generator)
        stage.descend(step(image, index), batch=batch, log_every=max(1, steps // 20))
    averaged: Probe = stage.emas["probe"].module
    return averaged
