"""Comparing a made object with the procedural family that its category names."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.procedural import CATEGORIES, render_objects, sample_objects


@torch.no_grad()
def best_family_iou(
    opacity: Tensor, cameras: Cameras, category: str, *, members: int = 256, generator: torch.Generator | None = None
) -> float:
    """Highest mean silhouette IoU over the views with any of ``members`` random objects of the family.

    Silhouettes, not volumes: a radiance field is a shell inside.

    Args:
        opacity: (V, H, W), of the object seen by ``cameras``; above 0.5 counts as covered.
        cameras: The V cameras.
        category: Name of the family.
        members: Size of the random sample of the family.
        generator: Source of the sample.

    Returns:
        IoU in [0, 1].

    Raises:
        ValueError: No family of this name.
    """
    if category not in CATEGORIES:
        raise ValueError(f"no family is called {category!r}; families are {', '.join(CATEGORIES)}")
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
