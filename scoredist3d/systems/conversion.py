"""From one representation to another: what a stage takes from the one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from scoredist3d.config import option
from scoredist3d.geometry.base import Start, prepare_loading
from scoredist3d.meshes.mesh import drop_small_components, topology
from scoredist3d.meshes.surface import find_surface
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
    lines = [f"{name}: continued" for name in ("material", "background") if _take_over(source, target, name)]
    if _take_over(source, target, "geometry"):
        _take_over(source, target, "renderer")
        target.go_on_counting(source.step)
        lines.append("geometry: continued")
    else:
        lines += _start_geometry(source, target, config, rng)
    return [f"system.init_from: {line}" for line in lines]


def _start_geometry(source: Scene, target: Scene, config: ConversionConfig, rng: Rng) -> list[str]:
    shape = SceneShape(source)
    threshold = None if config.threshold == "auto" else config.threshold
    found = find_surface(shape, config.resolution, threshold=threshold)
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

    said = target.geometry.start_from(Start(mesh=mesh, features=features, shape=shape), rng)
    return [*lines, said] if said else lines


def _take_over(source: Scene, target: Scene, name: str) -> bool:
    """Load a part's weights where both scenes have the same part; whether there was anything to load."""
    ours: Any = getattr(target, name)
    theirs: Any = getattr(source, name)
    state = theirs.state_dict()
    if type(ours) is not type(theirs) or not state or ours.state_dict().keys() != state.keys():
        return False
    prepare_loading(ours, state)
    if any(value.shape != state[key].shape for key, value in ours.state_dict().items()):
        return False
    ours.load_state_dict(state)
    return True
