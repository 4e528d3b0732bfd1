"""Procedural objects as the truth beside an exported mesh: what a prompt states, their images and their meshes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import Mesh, decimate, drop_small_components
from scoredist3d.procedural import CATEGORIES, COLORS, FINISHES, PATTERNS, Objects, ShapeRender, render_objects
from scoredist3d.procedural.attributes import DEFAULT_SECOND, NATURAL_COLORS, PATTERN_NOUNS
from scoredist3d.procedural.patterns import surface_color
from scoredist3d.procedural.primitives import Hits

RADIUS = 1.0
"""Radius of the ball that contains every procedural object, scene units."""
_INSIDE = 1e6  # density; far above the level 1, so that the surface is where the occupancy changes
# The occupancy only says on which side of the surface a point lies, so each step halves the error of a vertex.
_REFINE_STEPS = 10


@dataclass(frozen=True)
class Stated:
    """What a short prompt states about one object.

    Attributes:
        category: Name of the family.
        color: Name of the main color, which a material without a color implies; None if neither is stated.
        pattern, finish: Names; ``plain`` and an empty string if nothing is stated.
    """

    category: str
    color: str | None
    pattern: str = PATTERNS[0]
    finish: str = FINISHES[0]

    @classmethod
    def of(cls, prompt: str) -> Stated:
        """Read "a CATEGORY" with any of a color, a pattern and a finish before the noun, e.g. "a wooden chair".

        Raises:
            ValueError: The prompt has another form, or the procedural objects have no such category.
        """
        _, _, noun = prompt.partition(" ")
        found: dict[str, str] = {}
        while noun not in CATEGORIES:
            word, _, noun = noun.partition(" ")
            kind = next((kind for kind, names in _ADJECTIVES.items() if word and word in names), None)
            if kind is None or kind in found:
                raise ValueError(
                    f"prompt {prompt!r} must be 'a CATEGORY' or 'a COLOR CATEGORY', also with a pattern "
                    f"({', '.join(PATTERNS)}) and a finish ({', '.join(filter(None, FINISHES))}) before the noun; "
                    f"categories are {', '.join(CATEGORIES)}"
                )
            found[kind] = word
        material = found.get("finish" if found.get("finish") in NATURAL_COLORS else "pattern", "")
        return cls(noun, found.pop("color", NATURAL_COLORS.get(material)), **found)

    @property
    def look(self) -> dict[str, int]:
        """Colors, pattern and finish as arguments of :func:`~scoredist3d.procedural.sample_objects`.

        An object without a stated pattern has one color.

        Raises:
            ValueError: No color is stated.
        """
        if self.color is None:
            raise ValueError(f"the color of the {self.category} is not stated; name one of {', '.join(COLORS)}")
        second = DEFAULT_SECOND[self.color] if self.pattern in PATTERN_NOUNS else self.color
        return {
            "color": COLORS.index(self.color),
            "second_color": COLORS.index(second),
            "pattern": PATTERNS.index(self.pattern),
            "finish": FINISHES.index(self.finish),
        }


_ADJECTIVES = {"color": COLORS, "pattern": PATTERNS, "finish": FINISHES}


def object_views(member: Objects, cameras: Cameras, *, lit: bool = True) -> ShapeRender:
    """Images of one procedural object from ``B`` cameras.

    Args:
        member: A batch of one.
        cameras: The B cameras, on the same device.
        lit: Whether to show the object under the light of the training data, or its colors without lighting.
    """
    return render_objects(member.repeat_interleave(len(cameras)), cameras, shader=None if lit else _unlit)


def _unlit(surface: Tensor, geometry: Tensor, hits: Hits, light: Tensor, directions: Tensor) -> Tensor:
    return surface_color(surface, geometry, hits)[0]


def object_mesh(member: Objects, *, resolution: int, max_faces: int, least_volume: float) -> Mesh:
    """Mesh of one procedural object, extracted and simplified as the default exporter does it with a density.

    Args:
        member: A batch of one.
        resolution: Samples along each side of the cube around the object's ball.
        max_faces: Maximum number of faces.
        least_volume: Components smaller than this fraction of the largest one are dropped.

    Raises:
        ValueError: The object is too thin for the resolution, so no surface is found.
    """
    found = find_surface(_OccupiedSpace(member), resolution, refine_steps=_REFINE_STEPS)
    surface, _ = drop_small_components(found.mesh, least_volume)
    # Simplification may split off tiny components.
    return drop_small_components(decimate(surface, max_faces), least_volume)[0]


@dataclass(frozen=True)
class _OccupiedSpace:
    """A procedural object as an :class:`~scoredist3d.meshes.exportable.Extractable`."""

    member: Objects
    radius: float = RADIUS
    iso_level: float | None = 1.0

    @property
    def device(self) -> torch.device:
        return self.member.device

    def density(self, points: Tensor) -> Tensor:
        return _INSIDE * self.member.occupancy(points[None])[0]

    def surface(self) -> None:
        return None
