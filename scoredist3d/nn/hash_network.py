"""Multiresolution hash grid followed by a small network (Instant-NGP, arXiv 2201.05989)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import option
from scoredist3d.limits import MAX_HASH_RESOLUTION, MAX_WIDTH
from scoredist3d.nn.mlp import MLP
from scoredist3d.nn.regression import fit_features
from scoredist3d.ops.hash_grid.encoding import hash_grid_encode
from scoredist3d.ops.hash_grid.spec import HashGridSpec
from scoredist3d.seeding import Rng


@dataclass
class CoarseToFineConfig:
    """Schedule that activates the levels from coarse to fine; the encoding of inactive levels is zero."""

    start_level: int | None = option(None, "Number of initially active levels; null activates all.", ge=1)
    start_step: int = option(0, "Step at which the schedule begins.", ge=0)
    every: int = option(100, "Number of steps between the activations of successive levels.", ge=1)


@dataclass
class HashGridConfig:
    """Options of a multiresolution hash grid over the cube around the ball."""

    num_levels: int = option(8, "Number of resolution levels.", ge=1, le=32)
    features_per_level: Literal[1, 2, 4, 8] = option(2, "Number of features per grid vertex and level.")
    log2_hashmap_size: int = option(
        14, "log2 of the maximum number of entries per level; finer levels share entries by hashing.", ge=4, le=24
    )
    base_resolution: int = option(8, "Vertices per axis of the coarsest level.", ge=2, le=MAX_HASH_RESOLUTION)
    per_level_scale: float = option(1.5, "Ratio of the resolutions of successive levels.", ge=1)
    max_resolution: int | None = option(
        None, "Vertices per axis of the finest level; overrides per_level_scale.", ge=2, le=MAX_HASH_RESOLUTION
    )
    initial_range: float = option(1e-4, "Entries are initially uniform in [-initial_range, initial_range].", gt=0)
    coarse_to_fine: CoarseToFineConfig = field(
        default_factory=CoarseToFineConfig, metadata={"help": "Schedule that activates the levels from coarse to fine."}
    )
    backend: Literal["auto", "torch", "native", "triton", "tinycudann"] = option(
        "auto", "Implementation of the encoding; with analytic normals, tinycudann falls back to auto."
    )


@dataclass
class NetworkConfig:
    """Options of the network after the encoding."""

    hidden_width: int = option(32, "Number of units per hidden layer.", ge=1, le=MAX_WIDTH)
    hidden_layers: int = option(1, "Number of hidden layers; 0 gives a linear map.", ge=0, le=8)


# Options of blocks with a hash grid that may differ from the saved ones when a run continues from their state.
FREE_OPTIONS = frozenset({"num_features", "grid.backend", "grid.initial_range", "grid.coarse_to_fine"})


class HashNetwork(nn.Module):
    """Base class for fields and textures: (N, 3) world points -> hash encoding -> network -> (N, K) values.

    Subclasses call :meth:`_build` in their constructor. It creates the parameters directly in the subclass, so that
    their names in the ``state_dict`` are always ``table`` and ``network.*``.

    Attributes:
        grid: Options of the hash grid.
        spec: Layout of the hash grid.
        radius: The grid covers the cube [-radius, radius]^3, scene units.
        table: (T, features_per_level), entries of all levels.
        network: The network after the encoding.
        num_active_levels: Number of active levels; the encoding of the others is zero and receives no gradient.
    """

    grid: HashGridConfig
    spec: HashGridSpec
    radius: float
    table: nn.Parameter
    network: MLP
    num_active_levels: int

    def _build(
        self, grid: HashGridConfig, network: NetworkConfig, num_outputs: int, radius: float, generator: torch.Generator
    ) -> None:
        """Create the parameters of the grid and the network.

        Args:
            grid: Options of the hash grid.
            network: Options of the network.
            num_outputs: K.
            radius: The grid covers the cube [-radius, radius]^3, scene units.
            generator: Random generator for the initial values, first of the table, then of the network.
        """
        self.grid, self.radius, self.spec = grid, radius, grid_spec(grid)
        table = torch.empty(self.spec.num_entries, grid.features_per_level)
        self.table = nn.Parameter(table.uniform_(-grid.initial_range, grid.initial_range, generator=generator))
        hidden = [network.hidden_width] * network.hidden_layers
        self.network = MLP([self.spec.output_dim, *hidden, num_outputs], generator)
        self.num_active_levels = self._active_levels(0)

    def update_step(self, step: int) -> None:
        """Activate the levels that are due at ``step``."""
        self.num_active_levels = self._active_levels(step)

    def _active_levels(self, step: int) -> int:
        """Number of levels that are active at ``step``."""
        schedule = self.grid.coarse_to_fine
        if schedule.start_level is None:
            return self.spec.num_levels
        return min(self.spec.num_levels, schedule.start_level + max(0, step - schedule.start_step) // schedule.every)

    def _raw(self, points: Tensor, *, num_outputs: int | None = None, twice_differentiable: bool = False) -> Tensor:
        """(N, K) values at (N, 3) points, or only the first ``num_outputs`` of them; differentiable."""
        unit = 0.5 + (0.5 / self.radius) * points
        backend: str = self.grid.backend
        if twice_differentiable and backend == "tinycudann":
            backend = "auto"
        encoding = hash_grid_encode(
            unit, self.table, self.spec, backend=backend, num_active_levels=self.num_active_levels
        )
        values: Tensor = self.network(encoding, num_outputs=num_outputs)
        return values

    def _fit(
        self,
        predict: Callable[[Tensor], Tensor],
        target: Callable[[Tensor], Tensor],
        points: Callable[[torch.Generator, int], Tensor],
        rng: Rng,
        *,
        steps: int = 300,
    ) -> float:
        """Fit ``predict``, a function of this grid and network, to ``target``; see :func:`fit_features`.

        Only the levels that are active at step 0 are fitted. The entries of the others are set to zero, so that their
        later activation does not change the values. Frozen parameters are fitted too, and remain frozen.

        Returns:
            Root mean square error with the levels that are active at step 0.
        """
        parameters = [self.table, *self.network.parameters()]
        trainable = [parameter.requires_grad for parameter in parameters]
        levels, self.num_active_levels = self.num_active_levels, self._active_levels(0)
        with torch.no_grad():
            self.table[self.spec.offsets[self.num_active_levels] :] = 0.0
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            return fit_features(predict, target, parameters, points, rng, steps=steps)
        finally:
            for parameter, wanted in zip(parameters, trainable, strict=True):
                parameter.requires_grad_(wanted)
            self.num_active_levels = levels


def grid_problems(grid: HashGridConfig) -> list[str]:
    """Error messages for inconsistent options of a ``grid`` block."""
    problems = []
    levels, start_level = grid.num_levels, grid.coarse_to_fine.start_level
    if start_level is not None and start_level > levels:
        problems.append(
            f"grid.coarse_to_fine.start_level: must be at most grid.num_levels = {levels}, got {start_level}"
        )
    if grid.max_resolution is not None and grid.max_resolution < grid.base_resolution:
        problems.append(
            f"grid.max_resolution: must be at least grid.base_resolution = {grid.base_resolution}, "
            f"got {grid.max_resolution}"
        )
    return problems


def grid_spec(config: HashGridConfig) -> HashGridSpec:
    """The layout of the grid.

    If ``max_resolution`` is given, the scale follows from max_resolution = base_resolution * scale^(num_levels - 1).
    """
    scale = config.per_level_scale
    if config.max_resolution is not None and config.num_levels > 1:
        scale = (config.max_resolution / config.base_resolution) ** (1.0 / (config.num_levels - 1))
    return HashGridSpec(
        num_levels=config.num_levels,
        features_per_level=config.features_per_level,
        log2_hashmap_size=config.log2_hashmap_size,
        base_resolution=config.base_resolution,
        per_level_scale=scale,
    )
