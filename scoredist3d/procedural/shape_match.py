"""Silhouette comparison of a generated object with the procedural family of its category."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.procedural import CATEGORIES, Objects, render_objects, sample_objects


@dataclass(frozen=True)
class FamilyMatch:
    """The member of a family whose silhouettes are the most similar to those of an object.

    Attributes:
        member: The member, a batch of one.
        iou: Mean intersection over union (IoU) over the views, in [0, 1].
    """

    member: Objects
    iou: float


@torch.no_grad()
def best_family_match(
    opacity: Tensor,
    cameras: Cameras,
    category: str,
    *,
    members: int = 256,
    generator: torch.Generator | None = None,
    look: Mapping[str, int] | None = None,
) -> FamilyMatch:
    """The best match of an object's silhouettes among ``members`` random objects of a family.

    The best match has the highest mean IoU over the views. Silhouettes are compared rather than volumes, because a
    radiance field may be hollow.

    Args:
        opacity: (V, H, W), opacity of the object in each view; above 0.5 a pixel counts as covered.
        cameras: The V cameras.
        category: Name of the family.
        members: Number of random objects from the family.
        generator: Source of randomness for these objects.
        look: Colors, pattern and finish of these objects, as in :func:`sample_objects`; they do not change the shapes.

    Raises:
        ValueError: No family has this name.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category: there is no family {category!r}; choose one of {', '.join(CATEGORIES)}")
    generator = generator or torch.Generator(opacity.device).manual_seed(0)
    family = sample_objects(members, generator, opacity.device, category=CATEGORIES.index(category), **(look or {}))
    mask = opacity > 0.5
    total = torch.zeros(members, device=opacity.device)
    for view in range(len(cameras)):
        camera = cameras[torch.full((members,), view, device=opacity.device)]
        truth = render_objects(family, camera, antialias=1).rgba[..., 3] > 0.5
        intersection = (truth & mask[view]).sum((1, 2)).float()
        union = (truth | mask[view]).sum((1, 2)).float()
        total += intersection / union.clamp_min(1.0)
    best = int(total.argmax())
    return FamilyMatch(family[best], float(total[best] / len(cameras)))
