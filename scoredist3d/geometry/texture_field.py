"""Vector fields that use a hash grid and a small network, for surface textures and signed distance offsets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoredist3d.nn.hash_network import HashGridConfig, HashNetwork, NetworkConfig
from scoredist3d.seeding import Rng


class PointField(HashNetwork):
    """A vector field that maps (N, 3) world points to (N, K) values (Instant-NGP, arXiv 2201.05989).

    Args:
        grid, network: Options of the hash grid and of the network.
        num_outputs: K.
        radius: The grid covers the cube [-radius, radius]^3, scene units.
        generator: Random generator for the initial parameters.
    """

    def __init__(
        self,
        grid: HashGridConfig,
        network: NetworkConfig,
        *,
        num_outputs: int,
        radius: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._build(grid, network, num_outputs, radius, generator)

    def forward(self, points: Tensor) -> Tensor:
        """(N, K) values at (N, 3) points; differentiable in the parameters and the points."""
        return self._raw(points)

    @torch.no_grad()
    def set_zero(self) -> None:
        """Make the values zero everywhere by zeroing the last layer, which still receives gradients."""
        self.network.weights[-1].zero_()
        self.network.biases[-1].zero_()

    def fit(
        self,
        target: Callable[[Tensor], Tensor],
        points: Callable[[torch.Generator, int], Tensor],
        rng: Rng,
    ) -> float:
        """Fit the values to ``target`` at points drawn by ``points``; returns the root mean square error."""
        return self._fit(self, target, points, rng)
