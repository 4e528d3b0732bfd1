"""Scenes of two objects, "a red mug on a blue table" or "a robot next to a house", as one table of primitives.

Everything that renders single objects renders scenes. Both objects keep their
front towards +x. "on": the first object stands on the flat top of the second one. "beside": both stand on one ground
plane, the first at -y and the second at +y; seen from the front (from +x), the first is on the viewer's left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoredist3d.procedural.attributes import CATEGORIES, COLORS, PATTERN_WEIGHTS, PLAIN
from scoredist3d.procedural.batch import Batch
from scoredist3d.procedural.builder import extreme_points, fit
from scoredist3d.procedural.objects import EXTENT, Objects, sample_objects
from scoredist3d.procedural.primitives import NUM_HOLES, NUM_SOLIDS, cast_rays, empty_geometry, num_solids, take_rows

RELATIONS = ("on", "beside")
ON, BESIDE = range(2)
# Solids of a merged table. The unused rows of both objects are dropped; pairs that need more are drawn again.
SCENE_SOLIDS = 28

# Objects with a flat top, and where the first object stands on it: x in units of the extent of the support.
_SUPPORTS = {
    name: x
    for name, x in {"table": 0.0, "stool": 0.0, "bed": 0.12, "bench": 0.08, "barrel": 0.0, "crate": 0.0}.items()
    if name in CATEGORIES
}
_TOO_LARGE = frozenset({"table", "bed", "bench", "bookshelf"})  # furniture that nobody puts on other furniture
_P_PLAIN = 0.7
_RATIO_ON = (0.62, 0.85)  # size of the first object relative to its support
_SMALLEST_ON = 0.45  # pairs whose first object had to be smaller than this to find room are drawn again
_RATIO_BESIDE = (0.85, 1.18)
_GAP_BESIDE = (0.06, 0.18)
_SINK = 0.003  # depth to which an object sinks into its support, so that no light passes below it
_BASE_HEIGHT = 0.08  # points that are at most this high above the lowest one belong to the base
_DIRECTIONS, _RADII = 24, 20
_NO_OBSTACLE = 9.0  # more than the extent of any object


@dataclass(frozen=True)
class Scenes(Batch):
    """``N`` scenes of two objects.

    Attributes:
        objects: Merged tables, with SCENE_SOLIDS solids and NUM_HOLES holes; its attributes are those of the first
            object. Its :func:`azimuth_symmetry` is that of the first object too, not that of the scene.
        second: The second object as it was sampled, before it was placed; for its attributes.
        relation: (N,) int64, index into RELATIONS.
        of_second: (N, SCENE_SOLIDS + NUM_HOLES) bool, whether a row of the merged table belongs to the second object.
    """

    objects: Objects
    second: Objects
    relation: Tensor
    of_second: Tensor

    def __len__(self) -> int:
        return len(self.relation)


def sample_scenes(
    count: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    *,
    relation: int | Tensor | None = None,
) -> Scenes:
    """Generate random scenes.

    The two objects have different categories and colors and no special size; most of them are plain. The scene is
    centered and fitted into the unit ball like a single object. Pairs that need more than SCENE_SOLIDS solids or
    NUM_HOLES hollow ones, or whose first object finds no room on its support, are drawn again.

    Args:
        count: Number of scenes.
        generator: Source of all randomness; the scenes are made on its device.
        device: Device of the result; by default that of the generator.
        relation: Fixed relation: one index into RELATIONS for all scenes, or (count,). By default both are equally
            frequent.

    Raises:
        ValueError: ``count`` is not positive, or a relation is out of range.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if relation is None:
        relation = torch.randint(len(RELATIONS), (count,), generator=generator, device=generator.device)
    relations = torch.as_tensor(relation, dtype=torch.int64, device=generator.device).expand(count).clone()
    if bool(((relations < 0) | (relations >= len(RELATIONS))).any()):
        raise ValueError(f"relation must lie in [0, {len(RELATIONS)}), got {relation}")
    scenes, valid = _attempt(relations, generator)
    while len(missing := (~valid).nonzero()[:, 0]):
        again, valid[missing] = _attempt(relations[missing], generator)
        _assign(scenes, missing, again)
    return scenes if device is None else scenes.to(device)


def _assign(target: Any, index: Tensor, source: Any) -> None:
    """Overwrite the rows ``index`` of all tensors of a batch, including those of nested batches."""
    for field in fields(target):
        old, new = getattr(target, field.name), getattr(source, field.name)
        if isinstance(old, Tensor):
            old[index] = new
        else:
            _assign(old, index, new)


def _attempt(relation: Tensor, generator: torch.Generator) -> tuple[Scenes, Tensor]:
    """One scene for each relation, and whether it is valid, (N,) bool."""
    first, second = _sample_pairs(relation, generator)
    uniform = torch.rand(3, len(relation), generator=generator, device=generator.device)
    scale = torch.ones(2, len(relation), device=generator.device)
    offset = torch.zeros(2, len(relation), 3, device=generator.device)
    for index, arrange in enumerate((_arrange_on, _arrange_beside)):
        chosen = (relation == index).nonzero()[:, 0]
        if len(chosen):
            scale[:, chosen], offset[:, chosen] = arrange(first[chosen], second[chosen], uniform[:, chosen])
    geometry, surface, of_second, fits = _merge(
        first, second, _moved(first.geometry, scale[0], offset[0]), _moved(second.geometry, scale[1], offset[1])
    )
    extent = EXTENT[0] + (EXTENT[1] - EXTENT[0]) * uniform[2]
    geometry = fit(geometry, SCENE_SOLIDS, torch.ones_like(offset[0]), extent)
    valid = fits & (first.color != second.color) & ((relation != ON) | (scale[0] >= _SMALLEST_ON))
    return Scenes(replace(first, geometry=geometry, surface=surface), second, relation.clone(), of_second), valid


def _sample_pairs(relation: Tensor, generator: torch.Generator) -> tuple[Objects, Objects]:
    """First and second objects, not yet placed."""
    count, device = len(relation), generator.device
    u = torch.rand(3, count, generator=generator, device=device)
    supports = torch.tensor([CATEGORIES.index(name) for name in _SUPPORTS], device=device)
    portable = torch.tensor([i for i, name in enumerate(CATEGORIES) if name not in _TOO_LARGE], device=device)
    on = relation == ON
    second = torch.where(on, _pick(u[1], supports), (u[1] * len(CATEGORIES)).long().clamp_max(len(CATEGORIES) - 1))
    others = (second + 1 + (u[0] * (len(CATEGORIES) - 1)).long().clamp_max(len(CATEGORIES) - 2)) % len(CATEGORIES)
    first = torch.where(on, _pick(u[0], portable), others)
    # The only portable supports are small ones: a stool on a stool becomes a stool on a table.
    second = torch.where(first == second, supports[0], second)
    weights = torch.tensor(PATTERN_WEIGHTS, device=device)
    weights[PLAIN] = 0.0
    weights = (1.0 - _P_PLAIN) * weights / weights.sum()
    weights[PLAIN] = _P_PLAIN
    pattern = torch.multinomial(weights, 2 * count, replacement=True, generator=generator).view(2, count)
    one = sample_objects(count, generator, category=first, pattern=pattern[0], size=0)
    color = (one.color + 1 + (u[2] * (len(COLORS) - 1)).long().clamp_max(len(COLORS) - 2)) % len(COLORS)
    return one, sample_objects(count, generator, category=second, color=color, pattern=pattern[1], size=0)


def _pick(u: Tensor, choices: Tensor) -> Tensor:
    return choices[(u * len(choices)).long().clamp_max(len(choices) - 1)]


# -- arrangement -------------------------------------------------------------------------------------------------------


class _Outline(NamedTuple):
    """Points of an object, (N, 3, P), which of them are real, (N, P), and its bounding box, (N, 3) each."""

    points: Tensor
    real: Tensor
    low: Tensor
    high: Tensor


def _outline(objects: Objects) -> _Outline:
    geometry = objects.geometry[:, : num_solids(objects.geometry)]
    points = extreme_points(geometry, geometry[..., 0:9].unflatten(-1, (3, 3)), geometry[..., 9:12], levels=9, turns=48)
    real = (geometry[..., 20] > geometry[..., 19])[..., None].expand(*points.shape[:1], *points.shape[2:])
    points, real = points.flatten(2), real.flatten(1)
    low = torch.where(real[:, None], points, math.inf).amin(2)
    high = torch.where(real[:, None], points, -math.inf).amax(2)
    return _Outline(points, real, low, high)


def _arrange_on(first: Objects, second: Objects, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (2, N) and offsets (2, N, 3) that place the first object on top of the second one.

    The first object is as large as its base and the obstacles around it (a headboard, pillows) permit.
    """
    device = second.device
    shift = torch.tensor([_SUPPORTS.get(name, 0.0) for name in CATEGORIES], device=device)[second.category]
    place = torch.stack([shift, torch.zeros_like(shift)], -1)
    top, edge, obstacle = _room(second, place)

    outline = _outline(first)
    bottom = outline.low[:, 2]
    base = outline.real & (outline.points[:, 2] < bottom[:, None] + _BASE_HEIGHT)
    flat = outline.points[:, :2]
    low = torch.where(base[:, None], flat, math.inf).amin(2)
    high = torch.where(base[:, None], flat, -math.inf).amax(2)
    center = (low + high) / 2
    along = torch.einsum("kc,ncp->nkp", _compass(device), flat - center[..., None])
    reach = torch.where(outline.real[:, None], along, 0.0).amax(2)
    base_reach = torch.where(base[:, None], along, 0.0).amax(2)
    # Support functions are compared with radial ones, which is too strict for corners: 1.1 makes up for it.
    room = torch.minimum(1.1 * edge / base_reach.clamp_min(1e-3), obstacle / reach.clamp_min(1e-3)).amin(1)
    scale = torch.minimum(_RATIO_ON[0] + (_RATIO_ON[1] - _RATIO_ON[0]) * uniform[0], room)
    at = torch.cat([place - scale[:, None] * center, (top - scale * bottom - _SINK)[:, None]], 1)
    return torch.stack([scale, torch.ones_like(scale)]), torch.stack([at, torch.zeros_like(at)])


def _compass(device: torch.device) -> Tensor:
    """Horizontal unit vectors in all directions, (_DIRECTIONS, 2)."""
    angle = torch.arange(_DIRECTIONS, device=device) * (2 * math.pi / _DIRECTIONS)
    return torch.stack([angle.cos(), angle.sin()], -1)


def _room(support: Objects, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Height of the top at ``place`` (N, 2), exact, and the distances to its edge and to obstacles, (N, _DIRECTIONS).

    The edge is the last point at the height of the top, so that gaps between slats are no edges. An obstacle is the
    first point above that height. The rays, cast downwards, are 1 / _RADII apart.
    """
    radii = torch.arange(_RADII + 1, device=place.device) / _RADII
    flat = place[:, None, None] + radii[:, None] * _compass(place.device)[:, None]  # (N, K, R, 2)
    origins = torch.cat([flat, torch.full_like(flat[..., :1], 2.0)], -1).flatten(1, 2)
    down = torch.tensor([0.0, 0.0, -1.0], device=place.device).expand_as(origins)
    height = (2.0 - cast_rays(support.geometry, origins, down).t).unflatten(1, (_DIRECTIONS, _RADII + 1))
    top = height[:, 0, 0]
    above = height - top[:, None, None]
    free = torch.where(above > 0.01, radii - 1.0 / _RADII, _NO_OBSTACLE).amin(2)
    edge = torch.where(above.abs() < 0.01, radii, 0.0).amax(2)
    return top, torch.minimum(edge, free), free


def _arrange_beside(first: Objects, second: Objects, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (2, N) and offsets (2, N, 3) that place the objects side by side on the plane z = 0."""
    ratio = _RATIO_BESIDE[0] + (_RATIO_BESIDE[1] - _RATIO_BESIDE[0]) * uniform[0]
    gap = _GAP_BESIDE[0] + (_GAP_BESIDE[1] - _GAP_BESIDE[0]) * uniform[1]
    scale = torch.stack([ratio, torch.ones_like(ratio)])
    offsets = []
    for outline, factor, side in ((_outline(first), scale[0], -1), (_outline(second), scale[1], 1)):
        low, high = outline.low * factor[:, None], outline.high * factor[:, None]
        inner = high[:, 1] if side < 0 else low[:, 1]
        offsets.append(torch.stack([-(low + high)[:, 0] / 2, side * gap / 2 - inner, -low[:, 2]], -1))
    return scale, torch.stack(offsets)


# -- tables ------------------------------------------------------------------------------------------------------------


def _moved(geometry: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The geometry after p -> scale p + offset, with scale (N,) and offset (N, 3)."""
    matrix = geometry[..., 0:9] / scale[:, None, None]
    local = geometry[..., 9:12] - (matrix.unflatten(-1, (3, 3)) @ offset[:, None, :, None])[..., 0]
    return torch.cat([matrix, local, geometry[..., 12:]], -1)


def _merge(
    first: Objects, second: Objects, first_geometry: Tensor, second_geometry: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Geometry, surface and ``of_second`` of merged tables, and whether all solids of a pair found a row, (N,).

    Hollow solids come first, then the other solids in use; within each group, those of the first object come first.
    """
    count, device = len(first), first.device
    tables = []
    for one, two, empty in (
        (first_geometry, second_geometry, empty_geometry(count, device)[:, None]),
        (first.surface, second.surface, torch.zeros_like(first.surface[:, :1])),
    ):
        filler = empty.expand(-1, NUM_SOLIDS - NUM_HOLES, -1)
        solids = torch.cat([one[:, :NUM_SOLIDS], two[:, :NUM_SOLIDS]], 1)
        holes = torch.cat([one[:, NUM_SOLIDS:], filler, two[:, NUM_SOLIDS:], filler], 1)
        tables.append((solids, holes))
    (solids, holes), (paints, hole_paints) = tables
    used = solids[..., 20] > solids[..., 19]
    hollow = used & (holes[..., 20] > holes[..., 19])
    fits = (hollow.sum(1) <= NUM_HOLES) & (used.sum(1) <= SCENE_SOLIDS)
    rows = torch.argsort(2 - used.long() - hollow.long(), dim=1, stable=True)[:, :SCENE_SOLIDS]
    hole_rows = rows[:, :NUM_HOLES]
    geometry = torch.cat([take_rows(solids, rows), take_rows(holes, hole_rows)], 1)
    surface = torch.cat([take_rows(paints, rows), take_rows(hole_paints, hole_rows)], 1)
    return geometry, surface, torch.cat([rows, hole_rows], 1) >= NUM_SOLIDS, fits
