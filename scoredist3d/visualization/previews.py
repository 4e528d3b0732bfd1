"""Preview grids of a system: views of its scenes, or the images that it optimizes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.config.experiment import PreviewConfig
from scoredist3d.export.images import image_grid, row_grid
from scoredist3d.systems.base import System
from scoredist3d.systems.interfaces import HasImages, HasMethods, HasScenes
from scoredist3d.visualization.views import depth_image, render_views


@torch.no_grad()
def preview_grid(system: System, config: PreviewConfig) -> np.ndarray:
    """Preview grid of a system, an (H, W, 3) uint8 image.

    - Scenes: one column per view; rows for the color, opacity and depth of the first scene and for the color of each
      further scene.
    - Images of several methods: one labeled row per method.
    - Images: arranged in a near-square grid.

    Raises:
        TypeError: The system implements none of the protocols of :mod:`scoredist3d.systems.interfaces`.
    """
    if isinstance(system, HasScenes):
        return row_grid(scene_rows(system, config), labeled=False)
    if isinstance(system, HasMethods):
        return row_grid(method_rows(system, config.size), labeled=True)
    if isinstance(system, HasImages):
        return image_grid(system.images())
    raise TypeError(f"{type(system).__name__} has no scenes, images or methods to show; see systems/interfaces.py")


@torch.no_grad()
def scene_rows(system: HasScenes, config: PreviewConfig) -> dict[str, Tensor]:
    """Rows of images of a preview grid, by name, each (views, size, size, 3) in [0, 1].

    ``rgb``, ``opacity`` and ``depth`` show the first scene; ``rgb 2``, ``rgb 3``, ... show the others.
    """
    cameras = system.evaluation_cameras(config.azimuths, config.elevation, config.size, config.size)
    first, *others = system.list_scenes()
    renders = list(render_views(first, cameras))
    opacity = torch.cat([render.opacity for render in renders])
    depth = torch.cat([render.depth for render in renders])
    rows = {
        "rgb": torch.cat([render.rgb for render in renders]),
        "opacity": opacity.expand(*opacity.shape[:-1], 3),
        "depth": depth_image(depth, opacity).expand(*depth.shape[:-1], 3),
    }
    for number, scene in enumerate(others, start=2):
        rows[f"rgb {number}"] = torch.cat([render.rgb for render in render_views(scene, cameras)])
    return rows


@torch.no_grad()
def method_rows(system: HasMethods, size: int) -> dict[str, Tensor]:
    """Images of each method, (columns, size, size, 3), by method label; shorter rows are padded with white images."""
    rows = {label: method.images() for label, method in system.methods.items()}
    columns = max(len(images) for images in rows.values())
    return {label: _resized(images, size, columns) for label, images in rows.items()}


def _resized(images: Tensor, size: int, columns: int) -> Tensor:
    """(N, H, W, 3) images resized and padded with white images to (columns, size, size, 3)."""
    scaled = functional.interpolate(images.movedim(-1, 1), (size, size), mode="bilinear", antialias=True)
    filling = scaled.new_ones(columns - len(scaled), *scaled.shape[1:])
    return torch.cat([scaled, filling]).movedim(1, -1).clamp(0.0, 1.0)
