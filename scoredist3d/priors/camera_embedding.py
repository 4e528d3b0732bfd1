"""What a camera-conditioned denoiser is told about the camera."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras

CAMERA_EMBEDDING_SIZE = 16


def camera_embedding(cameras: Cameras) -> Tensor:
    """(B, 16): the camera-to-world matrix, rows flattened, its translation scaled to length 1.

    MVDream's convention (arXiv 2308.16512): the distance is not told, only the direction. "No camera" is sixteen zeros.
    """
    c2w = cameras.c2w.clone()
    c2w[:, :3, 3] = functional.normalize(c2w[:, :3, 3], dim=-1)
    return c2w.flatten(1)
