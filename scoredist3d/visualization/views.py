"""Evaluation renders of a scene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.renderers.base import Render
from scoredist3d.systems.scene import Scene


@torch.no_grad()
def render_views(scene: Scene, cameras: Cameras) -> Iterator[Render]:
    """One render per camera at the scene's current step, without randomness; ``rgb`` is a display image."""
    for index in range(len(cameras)):
        render = scene(cameras[index].to(scene.geometry.device), step=scene.step, rng=None)
        yield replace(render, rgb=scene.material.display(render.rgb))


def depth_image(depth: Tensor, opacity: Tensor) -> Tensor:
    """Depth as gray levels, (B, H, W, 1) in [0, 1]: 1 at the nearest pixel, 0.2 at the farthest, 0 for background.

    Args:
        depth: (B, H, W, 1), scene units.
        opacity: (B, H, W, 1); pixels with at most 0.5 count as background.
    """
    seen = opacity > 0.5
    if not bool(seen.any()):
        return torch.zeros_like(depth)
    near, far = depth[seen].min(), depth[seen].max()
    shade = 1.0 - 0.8 * (depth - near) / (far - near).clamp_min(1e-6)
    return torch.where(seen, shade, torch.zeros_like(shade))
