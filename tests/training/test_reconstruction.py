"""Every representation reconstructs a known object from 24 posed views to a given PSNR and Chamfer distance.

The sizes are small, so the file takes about a minute; ``benchmarks/representations.py`` uses full sizes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from representations import CASES, parts_of, posed_views, true_object

from scoredist3d import registry
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse, parse_component
from scoredist3d.evaluation.surface_distance import chamfer_distance, visible_points
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import drop_small_components
from scoredist3d.meshes.sampling import mesh_points
from scoredist3d.seeding import Rng
from scoredist3d.systems.scene import Scene, SceneShape
from scoredist3d.training.reconstruction import FitSettings, PosedViews, fit_scene, view_psnr

STEPS, SIZE = 120, 40
SMALL: dict[str, dict[str, Any]] = {
    "hash-nerf": {"renderer": {"num_samples": 48}},
    "hash-nerf, importance": {"renderer": {"num_samples": 24, "resampling": {"coarse_samples": 24}}},
    "hash-nerf, proposal": {"renderer": {"num_samples": 32}},
    "sdf": {"renderer": {"num_samples": 48}},
    "neus": {"renderer": {"num_samples": 48}},
    "dmtet": {"geometry": {"resolution": 32}},
    "dmtet, vertices": {"geometry": {"resolution": 24}},
    "flexicubes": {"geometry": {"resolution": 24}},
    "gaussians": {"geometry": {"num_points": 600, "densify": {"start": 40, "end": 90, "every": 25}}},
}
# Least PSNR in dB over views that were held back, largest Chamfer distance in fractions of the radius.
REACHED: dict[str, tuple[float, float]] = {
    "hash-nerf": (23.5, 0.06),
    "hash-nerf, importance": (23.5, 0.065),
    "hash-nerf, proposal": (22.5, 0.065),
    "sdf": (23.0, 0.045),
    "neus": (19.5, 0.045),
    "dmtet": (22.0, 0.037),
    "dmtet, vertices": (16.5, 0.065),
    "flexicubes": (22.7, 0.034),
    "gaussians": (21.7, 0.045),
}


@pytest.fixture(scope="module")
def views() -> tuple[PosedViews, PosedViews]:
    object = true_object("mug", "red", 0)
    return posed_views(object, 24, SIZE), posed_views(object, 6, SIZE, 0.5)


def shrunk(schedule: Any) -> Any:
    """Learning-rate schedules shortened to the number of steps of these tests."""
    if isinstance(schedule, dict):
        return {key: STEPS if key == "end" else shrunk(value) for key, value in schedule.items()}
    return schedule


def fitted(name: str, views: PosedViews) -> Scene:
    case = CASES[name]
    system = {part: {**case.system.get(part, {}), **SMALL[name].get(part, {})} for part in ("geometry", "renderer")}
    block = parts_of(replace(case, system=system))
    scene = Scene(block.geometry, block.material, block.background, block.renderer, rng=Rng())
    losses = {key: parse_component("loss", {"type": key, "weight": value}) for key, value in case.losses.items()}
    optimizer = parse(OptimizerConfig, shrunk(case.optimizer))
    history = fit_scene(scene, views, FitSettings(STEPS, 2, optimizer, losses), Rng())
    assert len(history) == STEPS and np.mean(history[-10:]) < 0.5 * np.mean(history[:5])
    return scene


# The other estimators' renders are compared with the first one's in tests/renderers.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("," in name and "hash" in name)) for name in CASES]
)
def test_a_known_object_is_recovered(name: str, views: tuple[PosedViews, PosedViews]) -> None:
    training, held_out = views
    scene = fitted(name, training)
    psnr = view_psnr(scene, held_out)
    mesh, _ = drop_small_components(find_surface(SceneShape(scene), 64).mesh, 0.02)
    generator = np.random.default_rng(0)
    truth = visible_points(true_object("mug", "red", 0), views=24, size=48).numpy()
    distance = chamfer_distance(mesh_points(mesh, 8000, generator), truth)
    least, largest = REACHED[name]
    print(f"{name}: {psnr:.1f} dB, {distance:.3f}")
    assert psnr > least
    assert distance < largest


def test_every_geometry_of_the_table_is_fitted() -> None:
    fitted_kinds = {parts_of(case).geometry.type for case in CASES.values()}
    others = {"image-canvas", "textured-mesh"}  # images; a mesh whose shape is given (its texture: test_textured_mesh)
    assert fitted_kinds == set(registry.names("geometry")) - others


def test_fits_repeat_bit_by_bit(views: tuple[PosedViews, PosedViews]) -> None:
    settings = FitSettings(3, 2)
    states = []
    for _ in range(2):
        block = parts_of(CASES["hash-nerf"])
        scene = Scene(block.geometry, block.material, block.background, block.renderer, rng=Rng(3))
        fit_scene(scene, views[0], settings, Rng(3))
        states.append(scene.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
