"""Statistics of sets of pictures: colourfulness, fine detail, spread, and distance to real renders.

Pictures are (N, H, W, 3) in [0, 1]; features are (N, F), those of the probe in the benchmarks.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.procedural import CATEGORIES, COLORS, Objects, captions_for, render_objects, sample_objects


def saturation(images: Tensor) -> Tensor:
    """(N,), mean of HSV's S = 1 - min / max over the pixels; 0 where a pixel is black."""
    high, low = images.amax(-1), images.amin(-1)
    return torch.where(high > 0, 1.0 - low / high.clamp_min(1e-8), 0.0).mean((1, 2))


def high_frequency_share(images: Tensor) -> Tensor:
    """(N,), share of the luminance's power, its mean left out, at more than 0.25 cycles per pixel (half of Nyquist).

    The radius of the frequency counts, so the corners of the spectrum are included. A picture that is uniform to
    rounding (standard deviation below 1e-6) has share 0.
    """
    luminance = images @ images.new_tensor([0.299, 0.587, 0.114])
    power = torch.fft.fft2(luminance - luminance.mean((1, 2), keepdim=True)).abs().square()
    height, width = luminance.shape[1:]
    y, x = (torch.fft.fftfreq(size, device=images.device) for size in (height, width))
    fine = (y[:, None].square() + x[None, :].square()).sqrt() > 0.25
    total = power.sum((1, 2))
    rounding = (1e-6 * height * width) ** 2  # Parseval: the total is the variance times (H W)^2
    return torch.where(total > rounding, (power * fine).sum((1, 2)) / total.clamp_min(rounding), 0.0)


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under k(a, b) = (a.b / F + 1)^3, the KID of arXiv 1801.01401 (eq. 4).

    Its mean is 0 for two samples of one distribution, so single values may be negative.

    Args:
        x: (N, F), N >= 2.
        y: (M, F), M >= 2.

    Raises:
        ValueError: Fewer than two rows on one side.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance needs two or more pictures on each side, got {n} and {m}")
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    within_x, within_y = kernel(x, x), kernel(y, y)
    inside = (within_x.sum() - within_x.trace()) / (n * (n - 1)) + (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return float(inside - 2.0 * kernel(x, y).mean())


def pair_distance(features: Tensor) -> float:
    """Mean Euclidean distance over all pairs of (N, F) rows.

    Raises:
        ValueError: Fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError("a distance between pictures needs two or more of them")
    return float(torch.nn.functional.pdist(features.double()).mean())


def label_entropy(labels: Tensor) -> float:
    """Plug-in entropy in nats of (N,) labels: at most log N."""
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return float(-(shares * shares.log()).sum())


def expected_entropy(labels: Tensor, count: int, *, draws: int = 500, seed: int = 0) -> float:
    """Mean :func:`label_entropy` of ``count`` labels drawn from (M,) labels with replacement.

    What a set of that size can be expected to have: small sets look less varied than large ones of the same source.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(labels), (draws, count), generator=generator)
    drawn = labels.cpu()[index].sort(dim=1).values
    # The entropy of a row is log n - sum_i log(multiplicity of label i) / n.
    equal = (drawn[:, :, None] == drawn[:, None, :]).sum(2).double()
    return float((math.log(count) - equal.log().mean(1)).mean())


def objects_of_caption(
    category: str, color: str | None, count: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Objects:
    """``count`` objects as the training data pairs them with the caption "a COLOUR CATEGORY", or "a CATEGORY".

    Objects of the category are drawn and captioned until that many captions have said these attributes and no others:
    what a caption leaves out is not uniform (plain objects need no second colour to be named).

    Raises:
        ValueError: No such category or colour.
    """
    for name, value, known in (("category", category, CATEGORIES), ("color", color or COLORS[0], COLORS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known; known are {', '.join(known)}")
    said = {"category": True, "color": color is not None}
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    kept: list[Objects] = []
    while sum(map(len, kept)) < count:
        fixed = None if color is None else COLORS.index(color)
        objects = sample_objects(1024, generator, category=CATEGORIES.index(category), color=fixed)
        captions = captions_for(objects, rng)
        fits = [
            index
            for index, caption in enumerate(captions)
            if all(value == said.get(name, False) for name, value in caption._asdict().items() if name != "text")
        ]
        kept.append(objects[torch.tensor(fits, dtype=torch.long)])
    return Objects.cat(kept)[:count].to(device)


@torch.no_grad()
def real_pictures(objects: Objects, cameras: Cameras, *, white: bool, seed: int = 0) -> Tensor:
    """(N, H, W, 3): object i seen by camera i, over white, or over white or a random grey as in the training data."""
    count, device = len(objects), objects.device
    background = torch.ones(count, 3, device=device)
    if not white:
        generator = torch.Generator().manual_seed(seed)
        grey = 0.1 + 0.9 * torch.rand(count, generator=generator)
        is_grey = torch.rand(count, generator=generator) < 0.5
        background = torch.where(is_grey, grey, torch.ones(count))[:, None].expand(-1, 3).to(device)
    return render_objects(objects, cameras).over(background).clamp(0.0, 1.0)
