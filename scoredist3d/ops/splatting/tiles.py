"""Assignment of Gaussians to image tiles, in plain torch.

A Gaussian is omitted from the list of a tile only if its alpha is below ``MIN_ALPHA`` at all pixels of the tile. The
image is therefore the same as if every Gaussian were composited at every pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops.splatting.constants import MIN_ALPHA, REACH_SLACK, TILE
from scoredist3d.ops.splatting.types import ProjectedGaussians, TileLists


@torch.no_grad()
def assign_tiles(projected: ProjectedGaussians, opacities: Tensor, height: int, width: int) -> TileLists:
    """Tile lists of all Gaussians, from the bounding boxes of their ellipses ``alpha >= MIN_ALPHA``.

    Args:
        opacities: (B, N).
    """
    batch, count = opacities.shape
    down, across = -(-height // TILE), -(-width // TILE)
    low, high = _tile_ranges(projected, opacities, (across, down))
    order = torch.sort(projected.depth.reshape(-1), stable=True).indices
    low, spans = low.reshape(-1, 2)[order], (high - low).reshape(-1, 2)[order]
    counts = spans[:, 0] * spans[:, 1]
    begin = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    total = int(begin[-1])
    owner = torch.repeat_interleave(counts, output_size=total)
    step = torch.arange(total, device=owner.device) - begin[owner]
    row = torch.div(step, spans[:, 0][owner], rounding_mode="floor")
    first_tile = (torch.div(order, max(count, 1), rounding_mode="floor") * down + low[:, 1]) * across + low[:, 0]
    tile = first_tile[owner] + row * across + (step - row * spans[:, 0][owner])
    # The Gaussians are in order of depth and the sort is stable, so the result is ordered by (tile, depth).
    tile, entry = torch.sort(tile.to(torch.int32), stable=True)
    edges = torch.arange(batch * down * across + 1, device=tile.device, dtype=torch.int32)
    gaussians = order[owner[entry]]
    # Rows are ordered by the index of the Gaussian, not by depth.
    row_offsets = torch.nn.functional.pad(torch.empty_like(counts).index_copy(0, order, counts).cumsum(0), (1, 0))
    shift = torch.empty_like(counts).index_copy(0, order, row_offsets[order] - begin[:-1])
    rows = entry + shift[gaussians]
    return TileLists(gaussians, rows, torch.searchsorted(tile, edges), row_offsets, batch, height, width)


def _tile_ranges(projected: ProjectedGaussians, opacities: Tensor, tiles: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) tile of each Gaussian, both (B, N, 2) as (across, down); equal if it is invisible."""
    # Distance in standard deviations at which alpha falls to MIN_ALPHA, enlarged to be safe against rounding.
    reach = ((2 * (opacities / MIN_ALPHA).log()).clamp(min=0) + REACH_SLACK).sqrt() * 1.001
    half = projected.stds * reach[..., None] + 0.001
    seen = projected.visible & (opacities >= MIN_ALPHA)
    limit = torch.tensor(tiles, device=opacities.device)
    # The center of pixel p is at p + 0.5, so p is covered if mean - half <= p + 0.5 <= mean + half.
    low = ((projected.means2d - half - 0.5) / TILE).clamp(min=0).minimum(limit.to(half.dtype)).floor().long()
    high = ((projected.means2d + half - 0.5) / TILE).clamp(min=-1).minimum(limit.to(half.dtype)).floor().long() + 1
    high = torch.where(seen[..., None], torch.minimum(high, limit), low)
    empty = (high <= low).any(dim=-1, keepdim=True)
    return low, torch.where(empty, low, high)
