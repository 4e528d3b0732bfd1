"""Statistics of sets of images: saturation, fine detail, diversity, and distance to reference renders.

Images are (N, H, W, 3) in [0, 1]. Features are (N, F); the benchmarks use the features of
:class:`scoredist3d.procedural.probe.Probe`, a small classifier of rendered objects.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.evaluation.fidelity import SOLID
from scoredist3d.procedural import CATEGORIES, COLORS, Objects, captions_for, render_objects, sample_objects


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation S = 1 - min / max over the pixels of each image, (N,); S is 0 for black pixels."""
    high, low = images.amax(-1), images.amin(-1)
    return torch.where(high > 0, 1.0 - low / high.clamp_min(1e-8), 0.0).mean((1, 2))


def chroma(images: Tensor, opacity: Tensor) -> float:
    """Mean of max - min over the channels of the pixels that show the object, in [0, 1]; 0 if there are none.

    Args:
        images: (N, H, W, 3).
        opacity: (N, H, W, 1); from 0.5 a pixel shows the object.
    """
    colors = images[opacity[..., 0] >= SOLID]
    return float((colors.amax(-1) - colors.amin(-1)).mean()) if len(colors) else 0.0


def high_frequency_share(images: Tensor) -> Tensor:
    """Share (N,) of each image's luminance power above 0.25 cycles per pixel (half the Nyquist frequency).

    The mean of the luminance is excluded. The threshold applies to the radial frequency, so the corners of the spectrum
    are included. An image that is uniform up to rounding (standard deviation below 1e-6) has share 0.
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
    """Unbiased estimate of the squared maximum mean discrepancy between two sets of features.

    With the kernel k(a, b) = (a.b / F + 1)^3, this is the KID of arXiv 1801.01401 (eq. 4). The expectation is 0 if both
    sets come from the same distribution, so single estimates can be negative.

    Args:
        x: (N, F) features, N >= 2.
        y: (M, F) features, M >= 2.

    Raises:
        ValueError: ``x`` or ``y`` has fewer than two rows.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"kernel_distance: both sets need at least two images, got {n} and {m}")
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    within_x, within_y = kernel(x, x), kernel(y, y)
    inside = (within_x.sum() - within_x.trace()) / (n * (n - 1)) + (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return float(inside - 2.0 * kernel(x, y).mean())


def pair_distance(features: Tensor) -> float:
    """Mean Euclidean distance over all pairs of rows of (N, F) features.

    Raises:
        ValueError: ``features`` has fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"pair_distance: at least two images are needed, got {len(features)}")
    return float(torch.nn.functional.pdist(features.double()).mean())


def label_entropy(labels: Tensor) -> float:
    """Plug-in estimate of the entropy of (N,) labels, in nats; at most log N."""
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return float(-(shares * shares.log()).sum())


def expected_entropy(labels: Tensor, count: int, *, draws: int = 500, seed: int = 0) -> float:
    """Mean :func:`label_entropy` of ``count`` labels drawn with replacement from (M,) labels, over ``draws`` samples.

    Compare the label entropy of a set of ``count`` images with this value, not with the label entropy of a larger set,
    because the estimate is lower for smaller sets from the same source.
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
    """Sample ``count`` objects that the training data pairs with the caption "a COLOR CATEGORY" or "a CATEGORY".

    Objects of the category are drawn and captioned until ``count`` captions state these attributes and no others. The
    attributes that a caption omits are not uniformly distributed: for example, captions of objects with one color never
    state a second color.

    Raises:
        ValueError: The category or color does not exist.
    """
    for name, value, known in (("category", category, CATEGORIES), ("color", color or COLORS[0], COLORS)):
        if value not in known:
            raise ValueError(f"{name}: {value!r} does not exist; choose one of {', '.join(known)}")
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
    """Reference renders (N, H, W, 3) of each object from the camera with the same index.

    The background is white. With ``white=False``, the background of each image is either white or a random gray, as in
    the training data.
    """
    count, device = len(objects), objects.device
    background = torch.ones(count, 3, device=device)
    if not white:
        generator = torch.Generator().manual_seed(seed)
        gray = 0.1 + 0.9 * torch.rand(count, generator=generator)
        is_gray = torch.rand(count, generator=generator) < 0.5
        background = torch.where(is_gray, gray, torch.ones(count))[:, None].expand(-1, 3).to(device)
    return render_objects(objects, cameras).over(background).clamp(0.0, 1.0)
