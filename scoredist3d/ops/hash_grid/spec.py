"""Parameters of a multiresolution hash grid, and the layout of its levels that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class HashGridSpec:
    """Parameters of a multiresolution hash grid, and the layout that follows from them.

    Attributes:
        num_levels: L, number of resolutions.
        features_per_level: F, number of features per table entry: 1, 2, 4 or 8.
        log2_hashmap_size: Base-2 logarithm of the maximum number of entries per level.
        base_resolution: Resolution of the coarsest level.
        per_level_scale: Ratio of the resolutions of successive levels, at least 1.
    """

    num_levels: int = 8
    features_per_level: int = 2
    log2_hashmap_size: int = 14
    base_resolution: int = 8
    per_level_scale: float = 1.5

    def __post_init__(self) -> None:
        if self.features_per_level not in (1, 2, 4, 8):
            raise ValueError(f"hash grid: features_per_level must be 1, 2, 4 or 8, got {self.features_per_level}")
        for name, low, high in (("num_levels", 1, 32), ("log2_hashmap_size", 3, 24)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"hash grid: {name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.base_resolution < 2:
            raise ValueError(f"hash grid: base_resolution must be 2 or more, got {self.base_resolution}")
        if not self.per_level_scale >= 1:
            raise ValueError(f"hash grid: per_level_scale must be 1 or more, got {self.per_level_scale}")
        if self.resolutions[-1] > 2**20:
            raise ValueError(
                f"hash grid: the finest resolution, {self.resolutions[-1]}, exceeds {2**20}; reduce num_levels, "
                "base_resolution or per_level_scale"
            )

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """Number of cells along an axis of the unit cube, per level; rounded to float32 as in tiny-cuda-nn."""
        growth = np.log2(np.float32(self.per_level_scale))
        powers = np.exp2(np.arange(self.num_levels, dtype=np.float32) * growth)
        return tuple(float(s) for s in powers * np.float32(self.base_resolution) - np.float32(1))

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Number of grid vertices along an axis, per level."""
        return tuple(int(np.ceil(scale)) + 1 for scale in self.scales)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of table entries per level; dense levels are padded to a multiple of eight."""
        return tuple(min((r**3 + 7) // 8 * 8, 2**self.log2_hashmap_size) for r in self.resolutions)

    @cached_property
    def hashed(self) -> tuple[bool, ...]:
        """Whether each level is hashed (True) or densely indexed (False)."""
        return tuple(r**3 > size for r, size in zip(self.resolutions, self.sizes, strict=True))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First table entry of each level, followed by the total number of entries (L + 1 values)."""
        return (0, *(int(end) for end in np.cumsum(self.sizes)))

    @property
    def num_entries(self) -> int:
        """Number of rows of the table."""
        return self.offsets[-1]

    @property
    def output_dim(self) -> int:
        """Number of output features per point, L * F."""
        return self.num_levels * self.features_per_level
