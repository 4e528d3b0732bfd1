"""Camera embedding of camera-conditioned denoisers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras

CAMERA_EMBEDDING_SIZE = 16


def camera_embedding(cameras: Cameras) -> Tensor:
    """The flattened camera-to-world matrix in row-major order, (B, 16), with its translation normalized to length 1.

    This is the convention of MVDream (arXiv 2308.16512): the embedding contains the camera's direction, but not its
    distance. Sixteen zeros mean "no camera".
    """
    c2w = cameras.c2w.clone()
    c2w[:, :3, 3] = functional.normalize(c2w[:, :3, 3], dim=-1)
    return c2w.flatten(1)
