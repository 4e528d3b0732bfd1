"""Batches of procedural objects, and their random generation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from scoredist3d.procedural import primitives
from scoredist3d.procedural.attributes import (
    CATEGORIES,
    COLOR_VALUES,
    COLORS,
    DOTTED,
    FAMILIES,
    PATTERN_WEIGHTS,
    PATTERNS,
    PLAIN,
    SIZE_STRETCH,
    SIZE_WEIGHTS,
    SIZES,
)
from scoredist3d.procedural.builder import NUM_SURFACE_COLUMNS, Builder, fit
from scoredist3d.procedural.families import BUILDERS

_JITTER = 0.05  # standard deviation of the colors
_EXTENT = (0.82, 0.95)  # range of the distance of the farthest point from the center
# Probability of two colors for plain, wooden and brick objects. Patterned objects always have two colors, so half of
# all objects do.
_P_TWO_TONE = 0.28


@dataclass(frozen=True)
class Objects:
    """``N`` objects.

    Attributes:
        geometry: (N, E, 21), table of primitives; see :mod:`scoredist3d.procedural.primitives`.
        surface: (N, E, 8), first color, second color, pattern and phase of each primitive.
        category: (N,) int64, index into CATEGORIES.
        color: (N,) int64, index into COLORS; the color of most of the surface.
        second_color: (N,) int64, color of the named parts or of the pattern; equals ``color`` if there is only one.
        pattern: (N,) int64, index into PATTERNS.
        size: (N,) int64, index into SIZES.
        mode: (N,) int64, index into ``MODES[category]``.
    """

    geometry: Tensor
    surface: Tensor
    category: Tensor
    color: Tensor
    second_color: Tensor
    pattern: Tensor
    size: Tensor
    mode: Tensor

    def __len__(self) -> int:
        return len(self.category)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.category.device

    def __getitem__(self, index: int | slice | Tensor) -> Objects:
        """Select objects; the result keeps its batch dimension."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return Objects(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Objects:
        """The same objects on another device."""
        return Objects(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def repeat_interleave(self, repeats: int) -> Objects:
        """Repeat each object ``repeats`` times in a row, once for each of its views."""
        return Objects(**{f.name: getattr(self, f.name).repeat_interleave(repeats, 0) for f in fields(self)})

    @classmethod
    def cat(cls, batches: list[Objects]) -> Objects:
        """Concatenate batches, none of which may be trimmed."""
        return cls(**{f.name: torch.cat([getattr(b, f.name) for b in batches]) for f in fields(cls)})

    def trimmed(self) -> Objects:
        """The objects without the rows of solids that no object in the batch uses, for faster rendering.

        This synchronizes with the device once. Batches sorted by category benefit most.
        """
        solids = primitives.num_solids(self.geometry)
        used = (self.geometry[:, :solids, 20] > self.geometry[:, :solids, 19]).any(0).nonzero()
        keep = max(int(used.max()) + 1 if len(used) else 0, primitives.NUM_HOLES)
        if keep == solids:
            return self
        return replace(
            self,
            geometry=torch.cat([self.geometry[:, :keep], self.geometry[:, solids:]], 1),
            surface=torch.cat([self.surface[:, :keep], self.surface[:, solids:]], 1),
        )

    def occupancy(self, points: Tensor) -> Tensor:
        """Whether ``points`` (N, M, 3) lie inside the objects, as (N, M) bool; exact."""
        return primitives.occupancy(self.geometry, points)


def sample_objects(
    count: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    *,
    category: int | Tensor | None = None,
    color: int | Tensor | None = None,
    second_color: int | Tensor | None = None,
    pattern: int | Tensor | None = None,
    size: int | Tensor | None = None,
    mode: int | Tensor | None = None,
) -> Objects:
    """Generate random objects with balanced, independent attributes.

    Patterned objects (striped, checkered, dotted) always have two colors, other objects sometimes.

    Args:
        count: Number of objects.
        generator: Source of all randomness; the objects are made on its device.
        device: Device of the result; by default that of the generator.
        category, color, second_color, pattern, size, mode: Fixed attributes: one value for all objects, or (count,). A
            fixed second color that equals the color gives single-colored objects.

    Raises:
        ValueError: An attribute is out of range, or the two colors of a fixed pattern are equal.
    """
    draw = _Draw(count, generator)
    categories = draw.attribute("category", category, len(CATEGORIES))
    colors = draw.attribute("color", color, len(COLORS))
    patterns = draw.attribute("pattern", pattern, len(PATTERNS), PATTERN_WEIGHTS)
    sizes = draw.attribute("size", size, len(SIZES), SIZE_WEIGHTS)
    seconds, two_tone = _second_colors(draw, colors, patterns, second_color, pattern is not None)
    if second_color is not None and pattern is None:
        # A single-colored object cannot have a two-color pattern.
        patterns = torch.where((seconds == colors) & _needs_two(patterns), PLAIN, patterns)
    num_modes = torch.tensor([len(family.modes) for family in FAMILIES], device=generator.device)[categories]
    uniform_mode = (draw.uniform() * num_modes).long().clamp_max(num_modes - 1)
    modes = uniform_mode if mode is None else draw.given("mode", mode, num_modes)
    geometry, surface = _build(draw, categories, modes, colors, seconds, patterns, sizes, two_tone)
    objects = Objects(geometry, surface, categories, colors, seconds, patterns, sizes, modes)
    return objects if device is None else objects.to(device)


class _Draw:
    """Source of random numbers and attributes for one batch."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count = count
        self.generator = generator
        self.device = generator.device

    def uniform(self) -> Tensor:
        """Uniform random numbers in [0, 1), (count,)."""
        return torch.rand(self.count, generator=self.generator, device=self.device)

    def given(self, name: str, value: int | Tensor, bound: int | Tensor) -> Tensor:
        """A fixed attribute, (count,) int64.

        Raises:
            ValueError: A value is negative or not below ``bound``.
        """
        tensor = torch.as_tensor(value, device=self.device, dtype=torch.int64).expand(self.count)
        if bool(((tensor < 0) | (tensor >= bound)).any()):
            raise ValueError(
                f"{name} must lie in [0, {bound if isinstance(bound, int) else 'number of modes'}), got {value}"
            )
        return tensor.clone()

    def attribute(
        self, name: str, value: int | Tensor | None, bound: int, weights: tuple[float, ...] | None = None
    ) -> Tensor:
        """The given attribute, or a random one.

        A number is drawn in either case, so that the other attributes do not depend on which ones are fixed.
        """
        u = self.uniform()
        if value is not None:
            return self.given(name, value, bound)
        if weights is None:
            return (u * bound).long().clamp_max(bound - 1)
        edges = torch.tensor(weights, device=self.device).cumsum(0)[:-1]
        return torch.bucketize(u, edges)


def _needs_two(patterns: Tensor) -> Tensor:
    return (patterns > PLAIN) & (patterns <= DOTTED)


def _second_colors(
    draw: _Draw, colors: Tensor, patterns: Tensor, given: int | Tensor | None, pattern_fixed: bool
) -> tuple[Tensor, Tensor]:
    """Second colors, and whether each object has them on its named parts."""
    other = (colors + 1 + (draw.uniform() * (len(COLORS) - 1)).long().clamp_max(len(COLORS) - 2)) % len(COLORS)
    two_tone = draw.uniform() < _P_TWO_TONE
    patterned = _needs_two(patterns)
    if given is None:
        return torch.where(patterned | two_tone, other, colors), two_tone & ~patterned
    seconds = draw.given("second_color", given, len(COLORS))
    if pattern_fixed and bool((patterned & (seconds == colors)).any()):
        raise ValueError("second_color: the two colors of striped, checkered and dotted objects must differ")
    return seconds, (seconds != colors) & ~patterned


def _build(
    draw: _Draw,
    categories: Tensor,
    modes: Tensor,
    colors: Tensor,
    seconds: Tensor,
    patterns: Tensor,
    sizes: Tensor,
    two_tone: Tensor,
) -> tuple[Tensor, Tensor]:
    """Geometry and surface tables of all objects, built family by family."""
    palette = torch.tensor(COLOR_VALUES, device=draw.device)
    noise = _JITTER * torch.randn(2, draw.count, 3, generator=draw.generator, device=draw.device)
    first = (palette[colors] + noise[0]).clamp(0.0, 1.0)
    second = torch.where((seconds == colors)[:, None], first, (palette[seconds] + noise[1]).clamp(0.0, 1.0))
    factors = torch.tensor(SIZE_STRETCH, device=draw.device)[sizes]
    extent = _EXTENT[0] + (_EXTENT[1] - _EXTENT[0]) * draw.uniform()
    rows = primitives.NUM_SOLIDS + primitives.NUM_HOLES
    geometry = torch.empty(draw.count, rows, primitives.NUM_COLUMNS, device=draw.device)
    surface = torch.empty(draw.count, rows, NUM_SURFACE_COLUMNS, device=draw.device)
    for i, name in enumerate(CATEGORIES):
        chosen = (categories == i).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        builder = Builder(
            modes[chosen], first[chosen], second[chosen], patterns[chosen], two_tone[chosen], draw.generator
        )
        BUILDERS[name](builder)
        built, surface[chosen] = builder.tables()
        geometry[chosen] = fit(
            built, builder.num_pieces, factors[chosen], extent[chosen], axial=FAMILIES[i].symmetry != 1
        )
    return geometry, surface


def azimuth_symmetry(objects: Objects) -> Tensor:
    """Order of rotational symmetry about z of each object, (N,) int64.

    1 means a unique front, 2 that the object repeats after 180 degrees, 0 that the azimuth is undefined. In contrast to
    AZIMUTH_SYMMETRY, it depends on the mode (a round table) and on the size: a round object of size "wide" is oval.
    """
    device = objects.category.device
    table = torch.zeros(len(FAMILIES), max(len(family.modes) for family in FAMILIES), dtype=torch.int64)
    for i, family in enumerate(FAMILIES):
        for k, mode in enumerate(family.modes):
            table[i, k] = family.symmetry if mode.symmetry is None else mode.symmetry
    orders = table.to(device)[objects.category, objects.mode]
    oval = torch.where(orders % 2 == 0, 2, 1)
    return torch.where(objects.size == SIZES.index("wide"), oval, orders)
