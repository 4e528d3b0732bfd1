"""Visible triangles by nvdiffrast (Laine et al. 2020, arXiv 2011.03277): CUDA, float32.

Only its triangle indices are used. It rounds vertices to a fraction of a pixel, so pixels whose center is within that
distance of an edge may differ from those of the other backends.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import nvdiffrast.torch as nvdiffrast
import torch
from torch import Tensor


def visible_triangles(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """Index + 1 of the visible triangle at each pixel, 0 if there is none; (B, H, W) int32.

    The top row comes first (nvdiffrast itself starts with the bottom row).
    """
    with torch.no_grad():
        found, _ = nvdiffrast.rasterize(_context(clip.device), clip.contiguous(), faces.contiguous(), (height, width))
    return found[..., 3].flip(1).round().to(torch.int32).contiguous()


@cache
def _context(device: torch.device) -> Any:
    return nvdiffrast.RasterizeCudaContext(device=device)
