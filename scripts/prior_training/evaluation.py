"""Measurements of a prior by its samples, which the probe reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.diffusion.samplers import sample
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.procedural import (
    AZIMUTH_SYMMETRY,
    CATEGORIES,
    COLORS,
    DEFECTS,
    PATTERNS,
    RELATIONS,
    ShapeRender,
    azimuth_symmetry,
    degrade,
    render_objects,
    sample_objects,
    sample_scenes,
    scene_caption,
    simple_caption,
)
from scoredist3d.procedural.attributes import BRICK, CHECKERED, DOTTED, STRIPED, WOODEN
from scoredist3d.procedural.captions import with_article
from scoredist3d.procedural.probe import Probe, ProbeReading

from .cameras import training_cameras

_BATCH = 384


@dataclass(frozen=True)
class Sampler:
    """Draws samples of a prior with DDIM.

    Attributes:
        prior: The prior.
        steps: Number of steps.
    """

    prior: Prior
    steps: int

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        return next(self.prior.parameters()).device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], cameras: Cameras, *, scale: float, seed: int) -> Tensor:
        """Samples (N, H, W, 3) in [0, 1], one for each text and camera."""
        generator = torch.Generator(self.device).manual_seed(seed)
        images = []
        for start in range(0, len(texts), _BATCH):
            part = slice(start, start + _BATCH)
            views, prior = cameras[part], self.prior
            conditions = CFGConditions(prior.embed(texts[part], views), prior.embed([""] * len(views), views))
            z = sample(prior, conditions, steps=self.steps, scale=scale, generator=generator)
            images.append(prior.decode(z).clamp(0, 1))
        return torch.cat(images)

    def cameras(self, count: int, seed: int) -> Cameras:
        """Random cameras of the standard distance and field of view."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return training_cameras(count, self.prior.image_size, generator, self.device, varied=False)


def read_images(probe: Probe, images: Tensor) -> ProbeReading:
    """The probe's predictions for images (N, H, W, 3), computed in batches."""
    parts = [probe(chunk) for chunk in images.split(256)]
    names = ("category", "color", "second_color", "pattern", "present", "direction", "features")
    return ProbeReading(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def accuracy(
    probe: Probe, images: Tensor, category: Tensor, color: Tensor, azimuth: Tensor, order: Tensor
) -> dict[str, float | str]:
    """Shares of correct categories and colors, overall and of the worst category, and the azimuth error in degrees.

    The azimuth error is the median and the mean over objects with a front.
    """
    reading = read_images(probe, images)
    right_category = (reading.category.argmax(-1) == category).float()
    right_color = (reading.color.argmax(-1) == color).float()
    error = reading.azimuth_error_deg(azimuth, order)
    error = error[~error.isnan()]
    present = category.unique()
    by_category = torch.stack([right_category[category == c].mean() for c in present])
    by_color = torch.stack([right_color[category == c].mean() for c in present])
    return {
        "category": right_category.mean().item(),
        "color": right_color.mean().item(),
        "worst_category": by_category.min().item(),
        "worst_category_name": CATEGORIES[int(present[by_category.argmin()])],
        "worst_color": by_color.min().item(),
        "worst_color_name": CATEGORIES[int(present[by_color.argmin()])],
        "azimuth_median_deg": error.median().item(),
        "azimuth_mean_deg": error.mean().item(),
    }


def grid_of_captions(per_pair: int, limit: int, device: torch.device) -> tuple[Tensor, Tensor, list[str]]:
    """Categories, colors and captions: every category with every color, ``per_pair`` times, cut to ``limit``."""
    category = torch.arange(len(CATEGORIES)).repeat_interleave(len(COLORS) * per_pair)[:limit]
    color = torch.arange(len(COLORS)).repeat_interleave(per_pair).repeat(len(CATEGORIES))[:limit]
    return category.to(device), color.to(device), captions_of(category, color)


def captions_of(category: Tensor, color: Tensor) -> list[str]:
    """The captions "a COLOR CATEGORY"."""
    return [simple_caption(CATEGORIES[c], COLORS[k]) for c, k in zip(category.tolist(), color.tolist(), strict=True)]


def sampled_accuracy(
    sampler: Sampler, probe: Probe, *, scale: float, per_pair: int, limit: int
) -> dict[str, float | str]:
    """Accuracy of samples of "a COLOR CATEGORY" at one guidance scale."""
    category, color, texts = grid_of_captions(per_pair, limit, sampler.device)
    cameras = sampler.cameras(len(texts), 1234)
    images = sampler(texts, cameras, scale=scale, seed=1)
    # Families that are round unless stretched count as round: the azimuth of their samples is not evaluated.
    order = torch.tensor([AZIMUTH_SYMMETRY[name] for name in CATEGORIES], device=sampler.device)[category]
    return accuracy(probe, images, category, color, cameras.azimuth, order)


@torch.no_grad()
def probe_floor(sampler: Sampler, probe: Probe, *, count: int) -> dict[str, dict[str, float | str]]:
    """Accuracy of the probe on new real renders over white: plain objects, all objects, and these after encoding."""
    device, prior = sampler.device, sampler.prior
    generator = torch.Generator(device).manual_seed(4321)
    rows = {}
    for name, fixed in (("real renders, plain", {"pattern": 0, "size": 0}), ("real renders", {})):
        category = torch.arange(count, device=device) % len(CATEGORIES)
        objects = sample_objects(count, generator, device, category=category, **fixed)
        cameras = sampler.cameras(count, 99)
        images = render_in_blocks(objects, cameras)
        truth = (objects.category, objects.color, cameras.azimuth, azimuth_symmetry(objects))
        rows[name] = accuracy(probe, images, *truth)
    through = torch.cat([prior.decode(prior.encode(chunk)).clamp(0, 1) for chunk in images.split(128)])
    rows["real renders, encoded"] = accuracy(probe, through, *truth)
    return rows


def render_in_blocks(
    items: Any, cameras: Cameras, *, render: Callable[..., ShapeRender] = render_objects, block: int = 128
) -> Tensor:
    """Renders (N, H, W, 3) of objects, or of other items that ``render`` draws, over white."""
    white = torch.ones(3, device=cameras.azimuth.device)
    parts = [slice(start, start + block) for start in range(0, len(cameras), block)]
    return torch.cat([render(items[part], cameras[part], antialias=2).over(white) for part in parts])


def pattern_accuracy(sampler: Sampler, probe: Probe, *, scale: float, limit: int) -> dict[str, float]:
    """Share of samples of "a PATTERN COLOR CATEGORY" whose pattern the probe recognizes.

    Some patterns cannot be seen from some sides: the stripes of a mug from above. ``visible`` is the share among those
    captions and cameras for which the probe recognizes the pattern of a real render, as for each pattern; ``samples``
    and ``renders`` are the shares among all. ``renders again`` is the share of ``visible`` for other real renders of
    the same captions and cameras, which a perfect prior would reach.
    """
    patterns = (STRIPED, CHECKERED, DOTTED, WOODEN, BRICK)
    category = torch.arange(len(CATEGORIES)).repeat_interleave(len(patterns))[:limit]
    pattern = torch.tensor(patterns).repeat(len(CATEGORIES))[:limit]
    color = (torch.arange(len(category)) * 5) % len(COLORS)
    color = torch.where(pattern == WOODEN, COLORS.index("brown"), color)
    rows = zip(category.tolist(), pattern.tolist(), color.tolist(), strict=True)
    texts = [with_article(f"{PATTERNS[p]} {COLORS[k]} {CATEGORIES[c]}") for c, p, k in rows]
    device = sampler.device
    cameras = sampler.cameras(len(texts), 77)
    found = read_images(probe, sampler(texts, cameras, scale=scale, seed=2)).pattern.argmax(-1)
    generator = torch.Generator(device).manual_seed(5)
    attributes = {"category": category.to(device), "pattern": pattern.to(device), "color": color.to(device)}
    truth = pattern.to(device)
    seen, again = (
        read_images(probe, render_in_blocks(sample_objects(len(texts), generator, device, **attributes), cameras))
        .pattern.argmax(-1)
        .eq(truth)
        for _ in range(2)
    )
    right = (found == truth).float()
    result = {"visible": right[seen].mean(), "samples": right.mean(), "renders": seen.float().mean()}
    result["renders again"] = again[seen].float().mean()
    for p in patterns:
        result[PATTERNS[p]] = right[seen & (truth == p)].mean()
    return {name: value.item() for name, value in result.items()}


def scene_accuracy(sampler: Sampler, probe: Probe, *, scale: float, count: int) -> dict[str, float]:
    """Share of samples of two-object captions with both nouns among the probe's two strongest.

    One object can hide the other. ``visible`` is the share among those captions and cameras for which the probe finds
    both in a real render; ``samples`` and ``renders`` are the shares among all.
    """
    device = sampler.device
    generator = torch.Generator(device).manual_seed(8)
    scenes = sample_scenes(count, generator, device)
    objects, second = scenes.objects, scenes.second
    rows = zip(
        objects.category.tolist(),
        second.category.tolist(),
        scenes.relation.tolist(),
        objects.color.tolist(),
        second.color.tolist(),
        strict=True,
    )
    texts = [scene_caption(a, b, RELATIONS[r], COLORS[ca], COLORS[cb]) for a, b, r, ca, cb in rows]
    cameras = sampler.cameras(count, 78)
    sampled = sampler(texts, cameras, scale=scale, seed=3)
    found, seen = (
        (top == objects.category[:, None]).any(1) & (top == second.category[:, None]).any(1)
        for top in (
            read_images(probe, images).present.topk(2, -1).indices
            for images in (sampled, render_in_blocks(objects, cameras))
        )
    )
    different = objects.category != second.category
    found, seen = found[different], seen[different]
    result = {"visible": found[seen].float(), "samples": found.float(), "renders": seen.float()}
    return {name: value.mean().item() for name, value in result.items()}


def picture_statistics(images: Tensor) -> dict[str, float]:
    """Saturation, sharpness and noise of images (N, H, W, 3) in [0, 1].

    The saturation is the mean of max - min over the channels; the sharpness the 98th percentile of the horizontal
    gradient; the noise the median of the absolute difference from the mean over 3x3 pixels.
    """
    pixels = images.movedim(-1, 1)
    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    gradient = (pixels[..., 1:] - pixels[..., :-1]).abs().mean(1).flatten(1)
    return {
        "saturation": (images.amax(-1) - images.amin(-1)).mean().item(),
        "sharpness": gradient.quantile(0.98, dim=1).mean().item(),
        "noise": (pixels - blurred).abs().flatten(1).median(1).values.mean().item(),
    }


def defect_statistics(sampler: Sampler, *, scale: float, count: int) -> dict[str, dict[str, float]]:
    """Picture statistics of samples whose captions name a defect, and of really degraded renders."""
    device = sampler.device
    category = torch.arange(count) % len(CATEGORIES)
    color = (torch.arange(count) * 7) % len(COLORS)
    plain = captions_of(category, color)
    cameras = sampler.cameras(count, 79)
    rows = {"samples, no defect": picture_statistics(sampler(plain, cameras, scale=scale, seed=4))}
    for name in DEFECTS:
        texts = [f"a {name} photo of {text}" for text in plain]
        rows[f"samples, {name}"] = picture_statistics(sampler(texts, cameras, scale=scale, seed=4))
    generator = torch.Generator(device).manual_seed(6)
    objects = sample_objects(count, generator, device, category=category.to(device), color=color.to(device), pattern=0)
    rgba = torch.cat(
        [render_objects(objects[k : k + 128], cameras[k : k + 128], antialias=2).rgba for k in range(0, count, 128)]
    ).movedim(-1, 1)
    white = torch.ones(1, 3, 1, 1, device=device)
    none = torch.full((count,), -1, device=device)
    rows["renders, no defect"] = picture_statistics(degrade(rgba, white, none, generator).movedim(1, -1))
    for k, name in enumerate(DEFECTS):
        kind = torch.full((count,), k, device=device)
        bad = degrade(rgba, white, kind, generator)
        rows[f"renders, {name}"] = picture_statistics(bad.movedim(1, -1))
    return rows


@torch.no_grad()
def where_conditioning_acts(sampler: Sampler, *, count: int) -> list[dict[str, float]]:
    """Ratio of the x0 error with a wrong color, category or camera to that with the correct one, per timestep."""
    prior, device = sampler.prior, sampler.device
    generator = torch.Generator(device).manual_seed(99)
    color = torch.randint(0, len(COLORS), (count,), generator=generator, device=device)
    objects = sample_objects(count, generator, device, color=color, second_color=color)
    cameras = sampler.cameras(count, 98)
    z = torch.cat([prior.encode(chunk) for chunk in render_in_blocks(objects, cameras).split(128)])
    steps = torch.arange(count, device=device)
    other_color = (objects.color + 1 + steps % (len(COLORS) - 1)) % len(COLORS)
    other_category = (objects.category + 1 + steps % (len(CATEGORIES) - 1)) % len(CATEGORIES)
    texts = captions_of(objects.category, objects.color)
    right = prior.embed(texts, cameras)
    wrong = {
        "color": prior.embed(captions_of(objects.category, other_color), cameras),
        "category": prior.embed(captions_of(other_category, objects.color), cameras),
        "camera": prior.embed(texts, cameras[steps.roll(1)]),
    }
    rows = []
    for timestep in (0.05, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
        t = torch.full((count,), timestep, device=device)
        noise = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype)
        x_t = prior.schedule.add_noise(z, noise, t)
        errors = {
            name: sum(
                (prior.predict(x_t[k : k + 256], t[k : k + 256], condition[k : k + 256]).x0 - z[k : k + 256])  # type: ignore[misc]
                .square()
                .sum()
                .item()
                for k in range(0, count, 256)
            )
            for name, condition in {"right": right, **wrong}.items()
        }
        alpha, sigma = prior.schedule.alpha(t)[0].item(), prior.schedule.sigma(t)[0].item()
        signal = 20 * torch.log10(torch.tensor(alpha * z.std().item() / sigma)).item()
        rows.append({"t": timestep, "snr_db": signal} | {name: errors[name] / errors["right"] for name in wrong})
    return rows
