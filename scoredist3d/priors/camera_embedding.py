"""Camera embedding of camera-conditioned denoisers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras

CAMERA_EMBEDDING_SIZE = 16


def camera_embedding(cameras: Cameras, reference_extent: float | None = None) -> Tensor:
    """The flattened camera-to-world matrix in row-major order, (B, 16), with a normalized translation.

    This is the convention of MVDream (arXiv 2308.16512). There, the translation has length 1, so the embedding contains
    the camera's direction, but not its distance. With ``reference_extent``, the length is the visible height at the
    origin relative to a reference, so close-ups differ from distant views. Sixteen zeros mean "no camera".

    Args:
        cameras: B cameras that look towards the origin.
        reference_extent: Half the visible height at the origin, in scene units, for which the length is 1; None for
            length 1 in all cases.
    """
    c2w = cameras.c2w.clone()
    direction = functional.normalize(c2w[:, :3, 3], dim=-1)
    if reference_extent is not None:
        extent = c2w[:, :3, 3].norm(dim=-1) * torch.tan(cameras.fovy / 2)
        direction = direction * (extent / reference_extent)[:, None]
    c2w[:, :3, 3] = direction
    return c2w.flatten(1)
