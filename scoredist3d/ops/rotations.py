"""Rotations as unit quaternions (w, x, y, z)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) of any length; the columns are the rotated axes."""
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    entries = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def quaternion_product(left: Tensor, right: Tensor) -> Tensor:
    """Product (..., 4) of quaternions: the rotation ``right`` followed by ``left``."""
    a, b, c, d = left.unbind(-1)
    w, x, y, z = right.unbind(-1)
    return torch.stack(
        [
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ],
        dim=-1,
    )


def quaternions_to(directions: Tensor) -> Tensor:
    """Quaternions (N, 4) of the shortest rotations from +z to unit directions (N, 3); for -z, a half turn around x."""
    x, y, z = directions.unbind(-1)
    turn = torch.stack([1 + z, -y, x, torch.zeros_like(z)], dim=-1)
    opposite = (z < -1 + 1e-6)[:, None]
    return F.normalize(torch.where(opposite, turn.new_tensor([0.0, 1.0, 0.0, 0.0]), turn), dim=-1)
