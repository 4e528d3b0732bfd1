"""Which Gaussians touch which tile of the image, nearest first: the lists that every splatting backend walks.

The lists leave out only pairs of a Gaussian and a tile in which no pixel reaches ``MIN_ALPHA``. So the image does not
depend on the tiles: it is what compositing every Gaussian at every pixel would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scoredist3d.ops.splatting.splat import Projected

TILE = 16  # pixels along a side
MAX_ALPHA = 0.999  # keeps some light for what lies behind, and 1 / (1 - alpha) finite
MIN_ALPHA = 1 / 255  # less is not seen and is skipped
MIN_TRANSMITTANCE = 1e-4  # the Gaussian that would leave no more than this, and all behind it, are not drawn
# A Gaussian of opacity 1 falls to MIN_ALPHA at so many standard deviations.
REACH = math.sqrt(-2 * math.log(MIN_ALPHA))
REACH_SLACK = 1e-5  # added to the square of a reach, so that its rounding loses no pixel
# The Jacobian is taken at most so far out, in half fields of view: beyond, the linear perspective blows up.
FRUSTUM_MARGIN = 1.3
MOMENTS = 6  # columns of a kernel's gradient before the features: mean x, y, conic xx, xy, yy, opacity


@dataclass(frozen=True)
class Scene:
    """What the kernels composite: M Gaussians (those of the first camera, of the second, ...) onto B images.

    Attributes:
        means: (M, 2), pixels.
        conics: (M, 3), inverse covariance (xx, xy, yy).
        features: (M, K), what is blended.
        opacities: (M,).
    """

    means: Tensor
    conics: Tensor
    features: Tensor
    opacities: Tensor


@dataclass(frozen=True)
class TileLists:
    """The Gaussians of each tile.

    An entry is a pair of a tile and a Gaussian. Entries are numbered tile by tile, and within a tile from the nearest.
    For the gradients each entry also has a row of its own, numbered Gaussian by Gaussian: summing a Gaussian's rows in
    their order needs no atomics and gives the same bits every time.

    Attributes:
        gaussians: (P,) int64, each entry's Gaussian in [0, M).
        rows: (P,) int64, each entry's row.
        offsets: (T + 1,) int64, first entry of each tile; the tiles of the first image row by row, of the second, ...
        row_offsets: (M + 1,) int64, the rows of Gaussian j are from ``row_offsets[j]`` to ``row_offsets[j + 1]``.
        batch: B, images.
        height, width: pixels.
    """

    gaussians: Tensor
    rows: Tensor
    offsets: Tensor
    row_offsets: Tensor
    batch: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of an image: down, across."""
        return -(-self.height // TILE), -(-self.width // TILE)

    def __len__(self) -> int:
        return self.gaussians.shape[0]


@torch.no_grad()
def assign_tiles(projected: Projected, opacities: Tensor, height: int, width: int) -> TileLists:
    """Lists of the tiles that each Gaussian's ellipse ``alpha >= MIN_ALPHA`` may touch.

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
    # Stable, and the Gaussians already come by depth: sorted by (tile, depth).
    tile, entry = torch.sort(tile.to(torch.int32), stable=True)
    edges = torch.arange(batch * down * across + 1, device=tile.device, dtype=torch.int32)
    gaussians = order[owner[entry]]
    # Rows go by the Gaussians' numbers, not by depth.
    row_offsets = torch.nn.functional.pad(torch.empty_like(counts).index_copy(0, order, counts).cumsum(0), (1, 0))
    shift = torch.empty_like(counts).index_copy(0, order, row_offsets[order] - begin[:-1])
    rows = entry + shift[gaussians]
    return TileLists(gaussians, rows, torch.searchsorted(tile, edges), row_offsets, batch, height, width)


def _tile_ranges(projected: Projected, opacities: Tensor, tiles: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """First tile and one past the last (B, N, 2), as (across, down); equal where the Gaussian is not seen."""
    # Standard deviations to where alpha falls to MIN_ALPHA; a little more, so that rounding loses no pixel.
    reach = ((2 * (opacities / MIN_ALPHA).log()).clamp(min=0) + REACH_SLACK).sqrt() * 1.001
    half = projected.deviations * reach[..., None] + 0.001
    seen = projected.visible & (opacities >= MIN_ALPHA)
    limit = torch.tensor(tiles, device=opacities.device)
    # A pixel's centre lies at + 0.5, so pixel p is covered from p + 0.5 >= mean - half to p + 0.5 <= mean + half.
    low = ((projected.means2d - half - 0.5) / TILE).clamp(min=0).minimum(limit.to(half.dtype)).floor().long()
    high = ((projected.means2d + half - 0.5) / TILE).clamp(min=-1).minimum(limit.to(half.dtype)).floor().long() + 1
    high = torch.where(seen[..., None], torch.minimum(high, limit), low)
    empty = (high <= low).any(dim=-1, keepdim=True)
    return low, torch.where(empty, low, high)
