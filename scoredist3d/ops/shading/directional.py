"""Lambertian shading by lights that are fixed in the world."""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_LIGHT: tuple[float, float, float] = (0.60, 0.45, 0.66)
"""Direction towards the key light of procedural images: from above, in front and to one side, so that top, front and
both sides differ."""
AMBIENT, HEMISPHERE, KEY, FILL = 0.45, 0.14, 0.46, 0.22
"""Strengths of the lights of procedural images."""


def directional_lighting(
    normal: Tensor,
    light: Tensor,
    *,
    ambient: float = AMBIENT,
    hemisphere: float = HEMISPHERE,
    key: float = KEY,
    fill: float = FILL,
) -> Tensor:
    """Factor of the albedo on a Lambertian surface, (...).

    The sum of ambient light, a hemisphere light from above, a key light, and a weak fill light from the opposite side,
    so that faces that the key light does not reach differ, too. With the default strengths, which are those of the
    procedural images, the factor is at most 1.03.

    Args:
        normal: (..., 3), unit normals.
        light: (3,) or (..., 3), unit directions towards the key light.
        ambient, hemisphere, key, fill: Strengths of the lights.
    """
    lambert = (normal * light).sum(-1).clamp_min(0.0)
    opposite = torch.cat([-light[..., :2], 0.25 * light[..., 2:]], -1)
    filled = (normal * opposite).sum(-1).clamp_min(0.0)
    return ambient + hemisphere * 0.5 * (1.0 + normal[..., 2]) + key * lambert + fill * filled
