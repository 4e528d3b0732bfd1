"""Noise that is fixed on the surface of an object: maps of noise around it, and the cells that every latent sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.noise_fields import PersistentNoise

OPAQUE = 0.1
"""Opacity above which a render shows the object, as in the authors' code of CFD."""
STRETCH = 8.0
"""Longest edge of a triangle of the surface, in widths of a latent; longer ones span a gap between two surfaces."""
CHUNK = 2**21
"""Cells that are tested at once for whether they lie in a triangle, which takes about 200 MB."""
TILE = 64
"""Rows and columns of the tiles in which the maps are drawn."""
BYTES_AT_ONCE = 2**26
"""Memory of the tiles that are joined for one summation."""


@dataclass(frozen=True)
class NoiseMaps:
    """Layout of the six maps of a cube around the origin, one for each direction +x, -x, +y, -y, +z, -z.

    A map is an orthographic view of the cube, cut into layers of equal depth. A point of a surface belongs to one
    cell of each of the (at most three) maps whose direction its normal points to. The noise of a point thus depends on
    its position and on the side that is seen, and a patch of surface with area A covers at least A cells of unit area.

    Attributes:
        extent: Half the side of the cube, scene units.
        resolution: Rows and columns of every map.
        layers: Number of layers of every map.
    """

    extent: float
    resolution: int
    layers: int

    @property
    def tiles(self) -> int:
        """Tiles along one side of a layer; the last ones are not filled if the resolution is no multiple of 64."""
        return -(-self.resolution // TILE)

    @property
    def cells(self) -> int:
        """Number of cells of all maps."""
        return 6 * self.layers * (self.tiles * TILE) ** 2

    def cell(self, direction: Tensor, layer: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Index (N,) of cells, in the order of tiles; ``direction`` is 0 to 5."""
        tile = ((direction * self.layers + layer) * self.tiles + row // TILE) * self.tiles + column // TILE
        return (tile * TILE + row % TILE) * TILE + column % TILE


def surface_corners(depth: Tensor, opacity: Tensor, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Surface points at the corners of a grid of latents.

    A point is the mean of the visible points in a window of one latent around the corner, which smooths the depth.

    Args:
        depth, opacity: (B, H, W, 1), of the render.
        cameras: (B), of the render.
        height, width: Size h, w of the latents.

    Returns:
        (B, h+1, w+1, 3) world points, and a mask (B, h+1, w+1) of the corners at which the object is visible.
    """
    rays = cameras.with_size(depth.shape[1], depth.shape[2]).rays()
    visible = (opacity > OPAQUE).to(depth)
    points = torch.where(visible > 0, rays.origins + depth * rays.directions, 0.0)
    maps = torch.cat([points, visible, opacity], dim=-1).movedim(-1, 1)
    halves = functional.adaptive_avg_pool2d(maps, (2 * height, 2 * width))
    corners = functional.avg_pool2d(halves, 2, stride=2, padding=1, count_include_pad=False).movedim(1, -1)
    share = corners[..., 3:4]
    return corners[..., :3] / share.clamp(min=1e-6), (corners[..., 4] > OPAQUE) & (share[..., 0] > 0)


def surface_triangles(corners: Tensor, visible: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Triangles of the surface that the views see, two for each latent, with normals toward the camera.

    Args:
        corners: (B, h+1, w+1, 3) world points.
        visible: (B, h+1, w+1), mask of the valid points.
        reach: (B, h+1, w+1), longest edge of a triangle, scene units.

    Returns:
        (T, 3, 3) points of the triangles, and the index (T,) of their latents in the order (view, row, column).
    """
    index = torch.arange(visible.numel(), device=corners.device).reshape(visible.shape)
    a, b, c, d = index[:, :-1, :-1], index[:, :-1, 1:], index[:, 1:, :-1], index[:, 1:, 1:]
    faces = torch.stack([torch.stack([a, c, b], -1), torch.stack([b, c, d], -1)]).flatten(0, 3)
    latent = torch.arange(a.numel(), device=corners.device).repeat(2)
    points = corners.reshape(-1, 3)[faces]
    longest = (points - points.roll(1, dims=1)).norm(dim=-1).amax(dim=1)
    kept = visible.reshape(-1)[faces].all(dim=1) & (longest <= reach.reshape(-1)[faces].amin(dim=1))
    return points[kept], latent[kept]


def covered_cells(triangles: Tensor, latent: Tensor, per_view: int, maps: NoiseMaps) -> tuple[Tensor, Tensor]:
    """Cells of the maps whose centers lie in the triangles; in each view, a cell belongs to one latent only.

    Where several triangles of a view cover a cell, the outermost one in the direction of the map has it.

    Args:
        triangles: (T, 3, 3) points.
        latent: (T,), index of their latents in the order (view, row, column).
        per_view: Number of latents of a view.
        maps: Layout of the maps.

    Returns:
        Index (N,) of the cells, and the index (N,) of their latents, in the order (axis, view, cell).
    """
    all_cells, all_latents = [], []
    for axis in range(3):
        cells, face, height = _fragments(triangles, axis, maps)
        in_view = cells + latent[face] // per_view * maps.cells
        outermost = height.argsort(descending=True, stable=True)
        order = outermost[in_view[outermost].argsort(stable=True)]
        in_view = in_view[order]
        first = torch.ones_like(in_view, dtype=torch.bool)
        first[1:] = in_view[1:] != in_view[:-1]
        all_cells.append(in_view[first] % maps.cells)
        all_latents.append(latent[face[order][first]])
    return torch.cat(all_cells), torch.cat(all_latents)


def _fragments(triangles: Tensor, axis: int, maps: NoiseMaps) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (N,) that triangles cover in the two maps of an axis, their triangles (N,), and their heights (N,).

    The height is the coordinate in the direction of the map, scaled.
    """
    scaled = (triangles + maps.extent) / (2.0 * maps.extent)  # the cube is [0, 1]^3
    uv = maps.resolution * torch.stack([scaled[..., (axis + 1) % 3], scaled[..., (axis + 2) % 3]], dim=-1)
    low = torch.ceil(uv.amin(dim=1) - 0.5).clamp(0, maps.resolution).long()
    high = torch.floor(uv.amax(dim=1) - 0.5).clamp(-1, maps.resolution - 1).long()
    size = (high - low + 1).clamp(min=0)
    count = size.prod(dim=1)
    start = count.cumsum(0) - count
    parts = []
    for faces in _chunks(start):
        face = torch.repeat_interleave(faces, count[faces])
        within = torch.arange(len(face), device=face.device) - (start[face] - start[faces[:1]])
        column, row = low[face, 0] + within % size[face, 0], low[face, 1] + within // size[face, 0]
        # Coordinates relative to the center of the cell keep the precision of float32.
        corner = uv[face] - torch.stack([column, row], dim=-1)[:, None].to(uv) - 0.5
        weights = torch.stack([_cross(corner[:, i - 2], corner[:, i - 1]) for i in range(3)], dim=-1)
        area = weights.sum(dim=-1)  # twice the signed area: its sign is that of the normal along the axis
        inside = ((weights * area.sign()[:, None]) >= 0).all(dim=-1) & (area != 0)
        face, row, column, weights, area = (t[inside] for t in (face, row, column, weights, area))
        depth = (weights * scaled[face, :, axis]).sum(dim=-1) / area
        layer = (depth * maps.layers).long().clamp(0, maps.layers - 1)
        parts.append((maps.cell(2 * axis + (area < 0).long(), layer, row, column), face, depth * area.sign()))
    cells, face, height = (torch.cat(part) for part in zip(*parts, strict=True))
    return cells, face, height


def _chunks(start: Tensor) -> tuple[Tensor, ...]:
    """Indices of triangles in chunks of about ``CHUNK`` cells; ``start`` (T,) counts the cells of earlier triangles."""
    _, lengths = torch.unique_consecutive(start // CHUNK, return_counts=True)
    return torch.arange(len(start), device=start.device).split(lengths.tolist() or [0])


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """(N,) cross products of plane vectors (N, 2)."""
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


class SurfaceNoise:
    """Noise of latents that see the surface of an object: n = sum of the covered cells / sqrt(their number).

    The cells are N(0, 1) and no two latents of a view share one, so the latents of a view are N(0, 1) and independent.
    Two latents of different views have the correlation |A and B| / sqrt(|A| |B|), where A and B are their cells: 1
    for equal footprints, and less the more their sizes differ.

    The maps are never stored as a whole. A tile of a map is drawn from a generator of (seed, particle, map, tile), only
    when a view shows it. The noise is thus a function of seed, particle, step and view, and a checkpoint contains
    nothing of it. The tiles used last are kept up to a limit of memory.
    """

    def __init__(self, maps: NoiseMaps, persistent: PersistentNoise, *, cache_bytes: int) -> None:
        """Args:
        maps: Layout of the maps.
        persistent: Renewal of the noise over the steps.
        cache_bytes: Memory for tiles that are kept.
        """
        self._maps, self._persistent = maps, persistent
        self._cache_bytes, self._cache = cache_bytes, dict[tuple[object, ...], Tensor]()
        self._cached_bytes = 0

    def __call__(
        self, z: Tensor, depth: Tensor, opacity: Tensor, cameras: Cameras, ctx: StepContext
    ) -> tuple[Tensor, Tensor]:
        """Noise (B, C, h, w) of the latents ``z``, and a mask (B, 1, h, w) of the latents that have cells.

        Waits for the device, because the number of cells depends on the render.

        Args:
            z: (B, C, h, w).
            depth, opacity: (B, H, W, 1), of the render.
            cameras: (B), of the render.
            ctx: Context of the step.
        """
        batch, channels, height, width = z.shape
        dtype = torch.promote_types(depth.dtype, torch.float32)
        corners, visible = surface_corners(depth.detach().to(dtype), opacity.detach().to(dtype), cameras, height, width)
        pixel = 2.0 * torch.tan(cameras.fovy / 2.0) / height
        reach = STRETCH * pixel[:, None, None] * (corners - cameras.origins[:, None, None]).norm(dim=-1)
        cells, latent = covered_cells(*surface_triangles(corners, visible, reach), height * width, self._maps)
        drawn, slot = self._tiles_of(cells, latent // (height * width), ctx)
        count = torch.bincount(latent, minlength=batch * height * width).reshape(batch, -1)
        like = z.new_empty(batch, height * width, channels, dtype=torch.promote_types(z.dtype, torch.float32))
        total = self._persistent.along(ctx.step, lambda at: self._sums(drawn, slot, latent, like, ctx, at))
        n = (total / count.clamp(min=1).to(total).sqrt()[..., None]).to(z.dtype)
        return n.mT.contiguous().reshape(z.shape), (count > 0).reshape(batch, 1, height, width)

    def _tiles_of(self, cells: Tensor, view: Tensor, ctx: StepContext) -> tuple[list[tuple[int, int]], Tensor]:
        """The particle and the index of each tile that the cells need, and the row (N,) of each cell in these tiles."""
        tile_count = self._maps.cells // TILE**2
        shown = torch.tensor(ctx.particles, device=view.device)[view]
        tiles, slot = torch.unique(shown * tile_count + cells // TILE**2, return_inverse=True)
        return [divmod(tile, tile_count) for tile in tiles.tolist()], slot * TILE**2 + cells % TILE**2

    def _sums(
        self, drawn: list[tuple[int, int]], slot: Tensor, latent: Tensor, like: Tensor, ctx: StepContext, at: int
    ) -> Tensor:
        """Sums (B, h*w, C) of the covered cells in the maps that are drawn for step ``at``."""
        total = torch.zeros_like(like).flatten(0, 1)
        at_once = max(1, BYTES_AT_ONCE // (TILE**2 * like.shape[-1] * like.element_size()))
        for start in range(0, len(drawn), at_once):
            part = drawn[start : start + at_once]
            noise = torch.cat([self._tile(ctx, particle, tile, at, like) for particle, tile in part])
            row = slot - start * TILE**2
            if len(part) == len(drawn):
                total.index_add_(0, latent, noise[row])
            else:
                here = ((row >= 0) & (row < len(noise))).nonzero()[:, 0]
                total.index_add_(0, latent[here], noise[row[here]])
        return total.reshape(like.shape)

    def _tile(self, ctx: StepContext, particle: int, tile: int, at: int, like: Tensor) -> Tensor:
        """Noise (cells, C) of one tile, drawn for step ``at``."""
        key = (ctx.rng.seed, particle, tile, at, like.shape[-1], like.dtype, like.device)
        noise = self._cache.pop(key, None)
        if noise is None:
            noise = ctx.noise_of(particle, like.new_empty(TILE * TILE, like.shape[-1]), f"cfd/{tile}@{at}")
            self._cached_bytes += noise.nbytes
        self._cache[key] = noise  # the last one in the dictionary is the one used last
        while self._cached_bytes > self._cache_bytes and self._cache:
            self._cached_bytes -= self._cache.pop(next(iter(self._cache))).nbytes
        return noise
