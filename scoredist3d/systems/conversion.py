"""From one representation to another: what a stage takes from the one before it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.config import ComponentConfig, option, under
from scoredist3d.config.validation import dump
from scoredist3d.geometry.base import GeometryInit, fits
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import drop_small_components, topology
from scoredist3d.seeding import Rng
from scoredist3d.systems.scene import Scene, SceneShape


@dataclass
class ConversionConfig:
    """How the surface of the earlier scene is found; only where the representation changes."""

    resolution: int = option(128, "Density samples along each side of the cube around the ball.", ge=8, le=1024)
    threshold: Literal["auto"] | float = option(
        "auto", "Density of the surface; auto puts it where the renderer shows it, and says what it has found.", gt=0
    )
    min_component_volume: float = option(
        0.02, "Pieces smaller than this fraction of the largest one are dropped; 1 keeps only that one.", ge=0, le=1
    )


def convert(source: Scene, target: Scene, config: ConversionConfig, rng: Rng) -> list[str]:
    """Give ``target`` the object of ``source``; sentences on what was done.

    Each part that both scenes have goes on with what it has learned. Where the geometries differ, the target's starts
    from the source's surface and look.

    Raises:
        ValueError: The source has no surface, or the target's geometry or material cannot take it over.
    """
    learning = ("material", "background", "geometry")
    alike = {name for name in learning if means_the_same(target.blocks[name], source.blocks[name])}
    lines = [
        f"{name}: continued"
        for name in learning[:2]
        if name in alike and _take_over(getattr(source, name), getattr(target, name))
    ]
    if "geometry" in alike and _take_over(source.geometry, target.geometry):
        _take_over(source.renderer, target.renderer)
        target.go_on_counting(source.step)
        lines.append("geometry: continued")
    else:
        lines += _start_geometry(source, target, config, rng)
    return [f"system.init_from: {line}" for line in lines]


def _start_geometry(source: Scene, target: Scene, config: ConversionConfig, rng: Rng) -> list[str]:
    shape = SceneShape(source)
    threshold = None if config.threshold == "auto" else config.threshold
    found = find_surface(shape, config.resolution, threshold=threshold, setting="system.conversion.threshold")
    mesh = found.mesh
    if shape.surface() is None:
        mesh, _ = drop_small_components(mesh, config.min_component_volume)
    lines = []
    if found.threshold is not None and found.density_range is not None:
        low, high = found.density_range
        how = "given" if threshold is not None else "known" if shape.iso_level is not None else "found"
        lines.append(f"surface at density {found.threshold:.4g} ({how}; densities lie in [{low:.4g}, {high:.4g}])")
    seen = topology(mesh)
    closed = "watertight" if seen.watertight else f"{seen.holes} holes, {seen.nonmanifold_edges} non-manifold edges"
    lines.append(f"mesh of {len(mesh.faces):,} faces, {closed}, {seen.components} pieces")

    def features(points: Tensor) -> Tensor:
        return target.material.features_of(shape.channels(points))

    with under("geometry"):
        said = target.geometry.init_from(GeometryInit(mesh=mesh, features=features, shape=shape), rng)
    return [*lines, said] if said else lines


def means_the_same(ours: ComponentConfig, theirs: ComponentConfig | None) -> bool:
    """Whether a state of one block means the same under the other.

    Equal names and shapes do not say so: another radius or growth of the hash grid gives old entries another meaning.
    The class's ``free_options`` may differ.
    """
    if theirs is None or ours.type != theirs.type:
        return False
    free = registry.entry_of(ours).cls.free_options  # type: ignore[attr-defined]
    return _without(dump(ours), free) == _without(dump(theirs), free)


def _without(block: dict[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """A plain block without some options, named ``key`` or ``key.path``."""
    kept = copy.deepcopy(block)
    for option_path in options:
        *parents, last = option_path.split(".")
        inner = kept
        for parent in parents:
            inner = inner[parent]
        del inner[last]
    return kept


def _take_over(source: nn.Module, target: nn.Module) -> bool:
    """Load a part's weights where names and shapes agree; whether there was anything to load."""
    state = source.state_dict()
    if not state or not fits(target, state):
        return False
    target.load_state_dict(state)
    return True
