"""Conversion between representations: initializes the scene of one stage from the scene of an earlier one."""

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
from scoredist3d.geometry.protocols import Initializable
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import drop_small_components, topology
from scoredist3d.seeding import Rng
from scoredist3d.systems.scene import Scene, SceneShape


@dataclass
class ConversionConfig:
    """Options for extracting the earlier scene's surface; used only if the representation changes."""

    resolution: int = option(128, "Density samples along each side of the cube around the ball.", ge=8, le=1024)
    threshold: Literal["auto"] | float = option("auto", "Density of the surface; auto as for exporter.threshold.", gt=0)
    min_component_volume: float = option(
        0.02,
        "Remove components with a volume below this fraction of the largest one, except long thin parts near the rest; "
        "1 keeps only the largest.",
        ge=0,
        le=1,
    )


def convert(source: Scene, target: Scene, config: ConversionConfig, rng: Rng) -> list[str]:
    """Initialize ``target`` with the object of ``source``.

    Parts whose configs are equal in both scenes keep their trained weights. If the geometries differ, the target's
    geometry is initialized from the surface and the appearance of the source.

    Args:
        source: Trained scene.
        target: Scene to initialize.
        config: Options for the surface extraction.
        rng: Random streams for the initialization of the target.

    Returns:
        Log messages that state what was done.

    Raises:
        ValueError: The source has no surface, or the target's geometry or material cannot be initialized from it.
    """
    learning = ("material", "background", "geometry")
    alike = {name for name in learning if weights_compatible(target.blocks[name], source.blocks[name])}
    lines = [
        f"{name}: trained weights are kept"
        for name in learning[:2]
        if name in alike and _copy_weights(getattr(source, name), getattr(target, name))
    ]
    if "geometry" in alike and _copy_weights(source.geometry, target.geometry):
        _copy_weights(source.renderer, target.renderer)
        target.continue_at(source.clock.scene_step)
        lines.append("geometry: trained weights are kept")
    else:
        lines += _initialize_geometry(source, target, config, rng)
    return [f"system.init_from: {line}" for line in lines]


def _initialize_geometry(source: Scene, target: Scene, config: ConversionConfig, rng: Rng) -> list[str]:
    """Extract the source's surface and initialize the target's geometry from it; returns log messages."""
    if not isinstance(target.geometry, Initializable):
        raise ValueError(
            f"geometry.type: {target.blocks['geometry'].type} cannot be initialized from another representation; "
            "use another geometry, or remove system.init_from"
        )
    shape = SceneShape(source)
    threshold = None if config.threshold == "auto" else config.threshold
    found = find_surface(shape, config.resolution, threshold=threshold, setting="system.conversion.threshold")
    mesh = found.mesh
    if shape.surface() is None:
        mesh, _ = drop_small_components(mesh, config.min_component_volume)
    lines = []
    if found.threshold is None and found.density_range is not None:
        lines.append("surface fused from renders of the depth")
    elif found.threshold is not None and found.density_range is not None:
        low, high = found.density_range
        how = (
            "as configured"
            if threshold is not None
            else "defined by the geometry"
            if shape.iso_level is not None
            else "determined automatically"
        )
        lines.append(f"surface at density {found.threshold:.4g} ({how}; densities lie in [{low:.4g}, {high:.4g}])")
    found_topology = topology(mesh)
    closed = (
        "watertight"
        if found_topology.watertight
        else f"{found_topology.holes} holes, {found_topology.nonmanifold_edges} non-manifold edges"
    )
    lines.append(f"mesh of {len(mesh.faces):,} faces, {closed}, {found_topology.components} components")

    def features(points: Tensor) -> Tensor:
        return target.material.features_of(shape.channels(points))

    with under("geometry"):
        report = target.geometry.init_from(GeometryInit(mesh=mesh, features=features, shape=shape), rng)
    return [*lines, report] if report else lines


def weights_compatible(ours: ComponentConfig, theirs: ComponentConfig | None) -> bool:
    """Whether weights trained with one config block can be used with the other.

    Equal names and shapes of tensors are not enough: the entries of a hash grid depend on the radius and on the growth
    factor of its levels. Only the options in the class's ``free_options`` may differ.
    """
    if theirs is None or ours.type != theirs.type:
        return False
    component: Any = registry.entry_of(ours).cls
    free: frozenset[str] = component.free_options
    return _without(dump(ours), free) == _without(dump(theirs), free)


def _without(block: dict[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """Copy of a block of plain data without ``options``, each named ``key`` or ``key.path``."""
    kept = copy.deepcopy(block)
    for option_path in options:
        *parents, last = option_path.split(".")
        inner = kept
        for parent in parents:
            inner = inner[parent]
        del inner[last]
    return kept


def _copy_weights(source: nn.Module, target: nn.Module) -> bool:
    """Load the weights of ``source`` into ``target`` if names and shapes agree; returns whether any were loaded."""
    state = source.state_dict()
    if not state or not fits(target, state):
        return False
    target.load_state_dict(state)
    return True
