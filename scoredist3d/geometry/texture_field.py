"""Values at points in space from a hash grid and a small network: textures of surfaces, offsets of signed distances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoredist3d.nn.hash_network import HashGridConfig, HashNetwork, NetworkConfig
from scoredist3d.seeding import Rng


class PointField(HashNetwork):
    """(N, 3) world points -> (N, K) values (Instant-NGP, arXiv 2201.05989).

    Args:
        grid, network: Their blocks.
        num_outputs: K.
        radius: The cube [-radius, radius]^3 is the grid's.
        generator: Draws the starting values.
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
        """(N, K) at (N, 3); differentiable in the parameters, and in the points where they need it."""
        return self._raw(points)

    @torch.no_grad()
    def set_zero(self) -> None:
        """Make the values zero everywhere, in a way that training can leave."""
        self.network.weights[-1].zero_()
        self.network.biases[-1].zero_()

    def fit(
        self,
        target: Callable[[Tensor], Tensor],
        points: Callable[[torch.Generator, int], Tensor],
        rng: Rng,
    ) -> float:
        """Regress the values onto ``target`` at the points of a sampler; the root mean square error at step 0."""
        return self._fit(self, target, points, rng)
