"""Values at points in space from a hash grid and a small network: textures of surfaces, offsets of signed distances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scoredist3d.geometry.fitting import fit_features
from scoredist3d.geometry.hash_field import HashGridConfig, NetworkConfig, grid_spec
from scoredist3d.geometry.networks import MLP
from scoredist3d.ops.hash_grid import hash_grid_encode
from scoredist3d.seeding import Rng


class PointField(nn.Module):
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
        self.grid, self.radius = grid, radius
        self.spec = grid_spec(grid)
        table = torch.empty(self.spec.num_entries, grid.features_per_level)
        self.table = nn.Parameter(table.uniform_(-grid.initial_range, grid.initial_range, generator=generator))
        hidden = [network.hidden_width] * network.hidden_layers
        self.network = MLP([self.spec.output_dim, *hidden, num_outputs], generator)
        self.update_step(0)

    def forward(self, points: Tensor) -> Tensor:
        """(N, K) at (N, 3); differentiable in the parameters, and in the points where they need it."""
        unit = 0.5 + (0.5 / self.radius) * points
        encoding = hash_grid_encode(
            unit, self.table, self.spec, backend=self.grid.backend, num_active_levels=self.num_active_levels
        )
        values: Tensor = self.network(encoding)
        return values

    def update_step(self, step: int) -> None:
        """Coarse to fine: switch on the levels due at ``step``."""
        schedule, self.num_active_levels = self.grid.coarse_to_fine, self.spec.num_levels
        if schedule.start_level is not None:
            added = max(0, step - schedule.start_step) // schedule.every
            self.num_active_levels = min(self.spec.num_levels, schedule.start_level + added)

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
        """Regress the values onto ``target``, also where they are not to be trained; see :func:`fit_features`.

        All levels take part, so that those switched on later do not disturb what is there.

        Returns:
            Root mean square error.
        """
        parameters = list(self.parameters())
        trainable = [parameter.requires_grad for parameter in parameters]
        levels, self.num_active_levels = self.num_active_levels, self.spec.num_levels
        self.requires_grad_(True)
        error = fit_features(self, target, parameters, points, rng)
        for parameter, wanted in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(wanted)
        self.num_active_levels = levels
        return error
