"""Silhouette comparison of a generated object with the procedural family of its category."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.procedural import CATEGORIES, render_objects, sample_objects


@torch.no_grad()
def best_family_iou(
    opacity: Tensor, cameras: Cameras, category: str, *, members: int = 256, generator: torch.Generator | None = None
) -> float:
    """Intersection over union (IoU) of the object's silhouettes and those of the best match in the family.

    The best match is the one with the highest mean IoU over the views, among ``members`` random objects. Silhouettes
    are compared rather than volumes, because a radiance field may be hollow.

    Args:
        opacity: (V, H, W), opacity of the object in each view; above 0.5 a pixel counts as covered.
        cameras: The V cameras.
        category: Name of the family.
        members: Number of random objects from the family.
        generator: Source of randomness for these objects.

    Returns:
        Mean IoU over the views, in [0, 1].

    Raises:
        ValueError: No family has this name.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category: there is no family {category!r}; choose one of {', '.join(CATEGORIES)}")
    generator = generator or torch.Generator(opacity.device).manual_seed(0)
    family = sample_objects(members, generator, opacity.device, category=CATEGORIES.index(category))
    mask = opacity > 0.5
    total = torch.zeros(members, device=opacity.device)
    for view in range(len(cameras)):
        camera = cameras[torch.full((members,), view, device=opacity.device)]
        truth = render_objects(family, camera, antialias=1).rgba[..., 3] > 0.5
        intersection = (truth & mask[view]).sum((1, 2)).float()
        union = (truth | mask[view]).sum((1, 2)).float()
        total += intersection / union.clamp_min(1.0)
    return float((total / len(cameras)).max())
