"""Occupancy grid that marks empty space during optimization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class OccupancyGrid(nn.Module):
    """Running maximum of the density on a grid over [-radius, radius]^3 (Müller et al. 2022, appendix E.2).

    All state is in persistent buffers, so that a resumed run equals an uninterrupted one. Cells that do not intersect
    the ball of ``radius`` are never occupied.

    Args:
        resolution: G, number of cells along an axis.
        radius: Radius of the ball and half the side of the cube, scene units.
        threshold: A cell is occupied if the optical depth of one step in it exceeds this value, or the mean optical
            depth over the ball if that is smaller (which preserves faint scenes).
        step_size: Length of one ray marching step, scene units.
        warmup_updates: Number of initial updates that evaluate every cell in the ball.
    """

    occupied: Tensor
    density: Tensor
    num_updates: Tensor
    in_ball: Tensor

    def __init__(
        self,
        resolution: int = 64,
        radius: float = 1.0,
        *,
        threshold: float = 0.01,
        step_size: float = 0.01,
        warmup_updates: int = 16,
    ) -> None:
        super().__init__()
        if resolution < 1 or not radius > 0 or threshold < 0 or not step_size > 0 or warmup_updates < 1:
            raise ValueError(
                "occupancy grid: resolution, radius, step_size and warmup_updates must be positive and "
                "threshold must not be negative"
            )
        self.resolution, self.radius, self.threshold, self.step_size = resolution, radius, threshold, step_size
        self.warmup_updates = warmup_updates
        inside = _touches_ball(resolution)
        self.register_buffer("in_ball", inside, persistent=False)
        self.register_buffer("occupied", inside.clone())
        self.register_buffer("density", torch.zeros(resolution, resolution, resolution))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(
        self,
        density_fn: Callable[[Tensor], Tensor],
        generator: torch.Generator,
        *,
        decay: float = 0.95,
        chunk: int = 2**18,
    ) -> None:
        """Evaluate the density at a random point in some of the cells: ``density <- max(decay * density, new)``.

        During the warm-up every cell in the ball is evaluated; later a quarter of them, drawn uniformly, and at most
        the same number of occupied cells. If no cell exceeds the threshold, the whole ball counts as occupied, so that
        an empty scene still gets gradients.

        Args:
            density_fn: Function that maps points (N, 3), scene units, to densities (N,).
            generator: Random number generator on the device of the grid.
            decay: Factor on the stored density of the evaluated cells.
            chunk: Maximum number of points per call of ``density_fn``.
        """
        cells = self._cells_to_update(generator)
        device, resolution = self.density.device, self.resolution
        offsets = torch.rand(len(cells), 3, generator=generator, device=device)
        corners = torch.stack((cells // resolution**2, cells // resolution % resolution, cells % resolution), dim=1)
        points = ((corners + offsets) / resolution * 2 - 1) * self.radius
        new = torch.cat([density_fn(part).reshape(-1) for part in points.split(chunk)]).to(self.density)
        flat = self.density.view(-1)
        flat[cells] = torch.maximum(flat[cells] * decay, new)
        self._renew()
        self.num_updates += 1

    def _cells_to_update(self, generator: torch.Generator) -> Tensor:
        """Flat indices of the cells that this update evaluates."""
        inside = self.in_ball.flatten().nonzero()[:, 0]
        if int(self.num_updates) < self.warmup_updates:
            return inside
        count = max(1, len(inside) // 4)
        device = inside.device
        uniform = inside[torch.randperm(len(inside), generator=generator, device=device)[:count]]
        occupied = self.occupied.flatten().nonzero()[:, 0]
        occupied = occupied[torch.randperm(len(occupied), generator=generator, device=device)[:count]]
        return torch.cat((uniform, occupied)).unique()

    def _renew(self) -> None:
        """Recompute ``occupied`` from the densities."""
        depth = self.density * self.step_size
        limit = depth[self.in_ball].mean().clamp(max=self.threshold)
        occupied = (depth > limit) & self.in_ball
        self.occupied.copy_(torch.where(occupied.any(), occupied, self.in_ball))


def _touches_ball(resolution: int) -> Tensor:
    """(G, G, G) bool, whether each cell of [-1, 1]^3 intersects the unit ball."""
    edges = torch.linspace(-1, 1, resolution + 1)
    low, high = edges[:-1], edges[1:]
    nearest = torch.where((low < 0) & (high > 0), torch.zeros(()), torch.minimum(low.abs(), high.abs()))
    squared = nearest**2
    return squared[:, None, None] + squared[None, :, None] + squared[None, None, :] < 1
