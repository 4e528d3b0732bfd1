"""Triangle visibility by nvdiffrast (Laine et al. 2020, arXiv 2011.03277): CUDA, float32.

Only its triangle indices are used. It snaps vertices to a fraction of a pixel, so pixels whose centre lies within that
distance of an edge may differ from those of the other backends.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import nvdiffrast.torch as nvdiffrast
import torch
from torch import Tensor


def visible_triangles(clip: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) int32, triangle + 1 or 0; nvdiffrast's first row is the bottom one, ours the top."""
    with torch.no_grad():
        found, _ = nvdiffrast.rasterize(_context(clip.device), clip.contiguous(), faces.contiguous(), (height, width))
    return found[..., 3].flip(1).round().to(torch.int32).contiguous()


@cache
def _context(device: torch.device) -> Any:
    return nvdiffrast.RasterizeCudaContext(device=device)
