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
    DEFAULT_SECOND,
    DOTTED,
    FAMILIES,
    FINISH_WEIGHTS,
    FINISHES,
    MATT,
    METAL,
    NATURAL_COLORS,
    PATTERN_WEIGHTS,
    PATTERNS,
    PLAIN,
    SIZE_STRETCH,
    SIZE_WEIGHTS,
    SIZES,
    WOOD_COLOR,
    WOODEN,
)
from scoredist3d.procedural.batch import Batch
from scoredist3d.procedural.builder import NUM_SURFACE_COLUMNS, Builder, fit
from scoredist3d.procedural.families import BUILDERS

# Standard deviations of the colors. Those of wood and of black, white and gray objects differ in brightness rather than
# in hue.
_JITTER = 0.04
_NEUTRAL_JITTER = (0.035, 0.012)  # of the brightness, of each channel
_NEUTRALS = ("black", "white", "gray")
_DARKEST, _LIGHTEST = 0.10, 0.92  # of black and white
EXTENT = (0.82, 0.95)
"""Range of the distance of the farthest point of an object from the center."""
# Probability of two colors for plain, wooden and brick objects. Patterned objects always have two colors, so half of
# all objects do.
_P_TWO_TONE = 0.28
_P_DEFAULT_SECOND = 0.6  # of the patterned objects
_P_NATURAL = 0.65  # of the wooden and of the metal objects


@dataclass(frozen=True)
class Objects(Batch):
    """``N`` objects.

    Attributes:
        geometry: (N, E, 21), table of primitives; see :mod:`scoredist3d.procedural.primitives`.
        surface: (N, E, 8), first color, second color, pattern and finish of each primitive.
        category: (N,) int64, index into CATEGORIES.
        color: (N,) int64, index into COLORS; the color of most of the surface.
        second_color: (N,) int64, color of the named parts or of the pattern; equals ``color`` if there is only one.
        pattern: (N,) int64, index into PATTERNS.
        size: (N,) int64, index into SIZES.
        mode: (N,) int64, index into ``MODES[category]``.
        finish: (N,) int64, index into FINISHES.
    """

    geometry: Tensor
    surface: Tensor
    category: Tensor
    color: Tensor
    second_color: Tensor
    pattern: Tensor
    size: Tensor
    mode: Tensor
    finish: Tensor

    def __len__(self) -> int:
        return len(self.category)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.category.device

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

    def padded(self, solids: int) -> Objects:
        """The objects with empty rows up to ``solids`` solids, so that tables of all kinds have one shape."""
        missing = solids - primitives.num_solids(self.geometry)
        if missing <= 0:
            return self
        first = primitives.num_solids(self.geometry)
        empty = primitives.empty_geometry(missing, self.device).expand(len(self), -1, -1)
        blank = self.surface.new_zeros(len(self), missing, self.surface.shape[2])
        return replace(
            self,
            geometry=torch.cat([self.geometry[:, :first], empty, self.geometry[:, first:]], 1),
            surface=torch.cat([self.surface[:, :first], blank, self.surface[:, first:]], 1),
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
    finish: int | Tensor | None = None,
) -> Objects:
    """Generate random objects with balanced attributes.

    Attributes are independent with these exceptions. Patterned objects (striped, checkered, dotted) always have two
    colors, other objects sometimes; 60 % of them have the second color in DEFAULT_SECOND. 65 % of the wooden and metal
    objects have the color in NATURAL_COLORS. Wooden and brick objects are neither shiny nor metal.

    Args:
        count: Number of objects.
        generator: Source of all randomness; the objects are made on its device.
        device: Device of the result; by default that of the generator.
        category, color, second_color, pattern, size, mode, finish: Fixed attributes: one value for all objects, or
            (count,). A fixed second color that equals the color gives single-colored objects.

    Raises:
        ValueError: An attribute is out of range, the two colors of a fixed pattern are equal, or a fixed finish
            contradicts a fixed pattern.
    """
    draw = _Draw(count, generator)
    categories = draw.attribute("category", category, len(CATEGORIES))
    colors = draw.attribute("color", color, len(COLORS))
    patterns = draw.attribute("pattern", pattern, len(PATTERNS), PATTERN_WEIGHTS)
    sizes = draw.attribute("size", size, len(SIZES), SIZE_WEIGHTS)
    finishes = draw.attribute("finish", finish, len(FINISHES), FINISH_WEIGHTS)
    patterns, finishes = _compatible(patterns, finishes, pattern is not None, finish is not None)
    colors = _natural_colors(draw, colors, patterns, finishes, fixed=color is not None)
    seconds, two_tone = _second_colors(draw, colors, patterns, second_color, pattern is not None)
    if second_color is not None and pattern is None:
        # A single-colored object cannot have a two-color pattern.
        patterns = torch.where((seconds == colors) & needs_two(patterns), PLAIN, patterns)
    num_modes = torch.tensor([len(family.modes) for family in FAMILIES], device=generator.device)[categories]
    uniform_mode = (draw.uniform() * num_modes).long().clamp_max(num_modes - 1)
    modes = uniform_mode if mode is None else draw.given("mode", mode, num_modes)
    geometry, surface = _build(draw, categories, modes, colors, seconds, patterns, sizes, two_tone, finishes)
    objects = Objects(geometry, surface, categories, colors, seconds, patterns, sizes, modes, finishes)
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


def needs_two(patterns: Tensor) -> Tensor:
    """Whether each pattern consists of two colors."""
    return (patterns > PLAIN) & (patterns <= DOTTED)


def _boosted(draw: _Draw, probability: float, classes: int) -> Tensor:
    """Choose objects so that replacing a uniform attribute by a value gives that value the stated probability."""
    return draw.uniform() < (probability * classes - 1) / (classes - 1)


def _compatible(patterns: Tensor, finishes: Tensor, pattern_fixed: bool, finish_fixed: bool) -> tuple[Tensor, Tensor]:
    """Patterns and finishes without shiny or metal wood and bricks; a fixed attribute takes precedence."""
    clash = (patterns >= WOODEN) & (finishes != 0) & (finishes != MATT)
    if not finish_fixed:
        return patterns, torch.where(clash, 0, finishes)
    if pattern_fixed and bool(clash.any()):
        raise ValueError("finish: wooden and brick objects cannot be shiny or metal; use the finish 0 or matt")
    return torch.where(clash, PLAIN, patterns), finishes


def _natural_colors(draw: _Draw, colors: Tensor, patterns: Tensor, finishes: Tensor, *, fixed: bool) -> Tensor:
    """Colors in which most wooden objects are brown and most metal objects gray, unless the colors are fixed."""
    natural = _boosted(draw, _P_NATURAL, len(COLORS))
    if fixed:
        return colors
    colors = torch.where(natural & (patterns == WOODEN), COLORS.index(NATURAL_COLORS["wooden"]), colors)
    return torch.where(natural & (finishes == METAL), COLORS.index(NATURAL_COLORS["metal"]), colors)


def _second_colors(
    draw: _Draw, colors: Tensor, patterns: Tensor, given: int | Tensor | None, pattern_fixed: bool
) -> tuple[Tensor, Tensor]:
    """Second colors, and whether each object has them on its named parts."""
    other = (colors + 1 + (draw.uniform() * (len(COLORS) - 1)).long().clamp_max(len(COLORS) - 2)) % len(COLORS)
    two_tone = draw.uniform() < _P_TWO_TONE
    patterned = needs_two(patterns)
    # ``other`` is the default color with probability 1 / 11 in any case.
    usual = _boosted(draw, _P_DEFAULT_SECOND, len(COLORS) - 1)
    default = torch.tensor([COLORS.index(DEFAULT_SECOND[name]) for name in COLORS], device=draw.device)[colors]
    other = torch.where(patterned & usual, default, other)
    if given is None:
        return torch.where(patterned | two_tone, other, colors), two_tone & ~patterned
    seconds = draw.given("second_color", given, len(COLORS))
    if pattern_fixed and bool((patterned & (seconds == colors)).any()):
        raise ValueError("second_color: the two colors of striped, checkered and dotted objects must differ")
    return seconds, (seconds != colors) & ~patterned


def mean_colors(colors: Tensor, patterns: Tensor | None = None) -> Tensor:
    """First colors (N, 3), display sRGB, of objects without jitter; second colors if no patterns are given."""
    palette = torch.tensor(COLOR_VALUES, device=colors.device)[colors]
    if patterns is None:
        return palette
    return torch.where(_brown_wood(colors, patterns)[:, None], palette.new_tensor(WOOD_COLOR), palette)


def color_limits(colors: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of the channels of each color, (N, 1) each.

    White differs from a white background even where it is brightest, and black leaves room for darker details.
    """
    lowest, highest = torch.zeros(len(COLORS), device=colors.device), torch.ones(len(COLORS), device=colors.device)
    lowest[COLORS.index("black")], highest[COLORS.index("white")] = _DARKEST, _LIGHTEST
    return lowest[colors, None], highest[colors, None]


def _brown_wood(colors: Tensor, patterns: Tensor) -> Tensor:
    return (patterns == WOODEN) & (colors == COLORS.index("brown"))


def _color_values(draw: _Draw, colors: Tensor, seconds: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """First and second colors of the objects with jitter, (count, 3) each."""
    neutral = torch.tensor([name in _NEUTRALS for name in COLORS], device=draw.device)

    def jittered(base: Tensor, indices: Tensor, gray: Tensor) -> Tensor:
        noise = torch.randn(draw.count, 4, generator=draw.generator, device=draw.device)
        brightness, channel = _NEUTRAL_JITTER
        muted = brightness * noise[:, :1] + channel * noise[:, 1:]
        color = base + torch.where(gray[:, None], muted, _JITTER * noise[:, 1:])
        return torch.clamp(color, *color_limits(indices))

    first = jittered(mean_colors(colors, patterns), colors, neutral[colors] | _brown_wood(colors, patterns))
    second = jittered(mean_colors(seconds), seconds, neutral[seconds])
    return first, torch.where((seconds == colors)[:, None], first, second)


def _build(
    draw: _Draw,
    categories: Tensor,
    modes: Tensor,
    colors: Tensor,
    seconds: Tensor,
    patterns: Tensor,
    sizes: Tensor,
    two_tone: Tensor,
    finishes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Geometry and surface tables of all objects, built family by family."""
    first, second = _color_values(draw, colors, seconds, patterns)
    factors = torch.tensor(SIZE_STRETCH, device=draw.device)[sizes]
    extent = EXTENT[0] + (EXTENT[1] - EXTENT[0]) * draw.uniform()
    rows = primitives.NUM_SOLIDS + primitives.NUM_HOLES
    geometry = torch.empty(draw.count, rows, primitives.NUM_COLUMNS, device=draw.device)
    surface = torch.empty(draw.count, rows, NUM_SURFACE_COLUMNS, device=draw.device)
    for i, name in enumerate(CATEGORIES):
        chosen = (categories == i).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        builder = Builder(
            modes[chosen],
            first[chosen],
            second[chosen],
            patterns[chosen],
            two_tone[chosen],
            draw.generator,
            finishes[chosen],
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
