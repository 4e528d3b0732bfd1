"""Conversion between representations keeps surface and colors; equal parts keep their weights."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from scoredist3d import registry
from scoredist3d.config.fields import MISSING
from scoredist3d.config.validation import own_fields, parse_component
from scoredist3d.evaluation.surface_distance import chamfer_distance
from scoredist3d.geometry.base import GeometryInit
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import Mesh, drop_small_components, topology
from scoredist3d.meshes.sampling import mesh_points
from scoredist3d.seeding import Rng
from scoredist3d.systems.conversion import ConversionConfig, convert, weights_compatible
from scoredist3d.systems.scene import Scene, SceneShape

GRID: dict[str, Any] = {"grid": {"num_levels": 5, "log2_hashmap_size": 12}, "network": {"hidden_width": 16}}
BLOCKS: dict[str, dict[str, Any]] = {
    "nerf": {"geometry": {"type": "implicit-volume", **GRID}, "renderer": {"type": "volume", "num_samples": 32}},
    "sdf": {"geometry": {"type": "implicit-sdf", **GRID}, "renderer": {"type": "volume", "num_samples": 32}},
    "dmtet": {
        "geometry": {"type": "dmtet", "resolution": 32, **GRID},
        "renderer": {"type": "mesh-rasterizer"},
    },
    "flexicubes": {
        "geometry": {"type": "flexicubes", "resolution": 24, **GRID},
        "renderer": {"type": "mesh-rasterizer"},
    },
    "texture": {
        "geometry": {"type": "textured-mesh", "texture_size": 64, "max_faces": 1500},
        "renderer": {"type": "mesh-rasterizer"},
    },
    "gaussians": {
        "geometry": {"type": "gaussians", "num_points": 1500},
        "renderer": {"type": "gaussian-splatting"},
    },
}
SETTINGS = ConversionConfig(resolution=48)


def scene(name: str, seed: int = 0, **changes: Any) -> Scene:
    block = parse_component("system", {"type": "text-to-3d", **BLOCKS[name], **changes})
    return Scene(block.geometry, block.material, block.background, block.renderer, rng=Rng(seed))


def colors(points: torch.Tensor) -> torch.Tensor:
    return 0.5 + 0.4 * torch.sin(2.0 * points + points.new_tensor([0.3, 1.1, 2.3]))


def bowl() -> Mesh:
    """An off-center ellipsoid with three different radii."""
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=4)
    vertices = ball.vertices * [0.6, 0.45, 0.35] + [0.05, -0.1, 0.1]
    return Mesh(vertices.astype(np.float32), np.asarray(ball.faces, np.int64))


@pytest.fixture(scope="module")
def nerf() -> Scene:
    """A radiance field of the colored ellipsoid."""
    made = scene("nerf")

    def features(points: torch.Tensor) -> torch.Tensor:
        return torch.logit(colors(points))

    made.geometry.init_from(GeometryInit(mesh=bowl(), features=features), Rng(1))
    made.prepare_step(0, Rng())
    return made


def error_of(made: Scene) -> tuple[float, float]:
    """Chamfer distance to the ellipsoid, and mean error of the colors on it."""
    generator = np.random.default_rng(0)
    found = find_surface(SceneShape(made), 48).mesh
    truth = mesh_points(bowl(), 6000, generator)
    points = torch.from_numpy(truth[:1000]).float()
    off = (SceneShape(made).channels(points).base_color - colors(points)).abs().mean()
    return chamfer_distance(mesh_points(found, 6000, generator), truth), float(off)


CHAINS = [
    ("sdf",),
    ("dmtet",),
    ("flexicubes",),
    ("texture",),
    ("gaussians",),
    ("sdf", "dmtet", "texture"),
    ("gaussians", "dmtet", "nerf"),
]


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_an_object_survives_its_conversions(nerf: Scene, chain: tuple[str, ...]) -> None:
    made = nerf
    for name in chain:
        source, made = made, scene(name)
        convert(source, made, SETTINGS, Rng())
        made.prepare_step(0, Rng())
    distance, off = error_of(made)
    # Sampling alone contributes 0.01; Gaussians form a shell of finite thickness.
    assert distance < (0.05 if "gaussians" in chain else 0.03)
    assert off < 0.08
    whole, _ = drop_small_components(find_surface(SceneShape(made), 48).mesh, SETTINGS.min_component_volume)
    # The shell of Gaussians is thinner than a tetrahedron of the next grid, so it is torn.
    assert topology(whole).components == 1 or chain[0] == "gaussians"


def test_conversions_are_a_function_of_the_seed(nerf: Scene) -> None:
    twice = [scene("gaussians") for _ in range(3)]
    for made, seed in zip(twice, (0, 0, 1), strict=True):
        convert(nerf, made, SETTINGS, Rng(seed))
    first, second, other = (made.state_dict() for made in twice)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["geometry.means"], other["geometry.means"])


def test_the_surface_is_fused_unless_its_density_is_given(nerf: Scene) -> None:
    found = convert(nerf, scene("dmtet"), SETTINGS, Rng())
    assert found[0] == "system.init_from: surface fused from renders of the depth"
    given = convert(nerf, scene("dmtet"), ConversionConfig(resolution=48, threshold=3.0), Rng())
    assert "surface at density 3 (as configured;" in given[0]
    with pytest.raises(ValueError, match="densities lie in"):
        convert(nerf, scene("dmtet"), ConversionConfig(resolution=48, threshold=1e6), Rng())
    sdf = scene("sdf")
    convert(nerf, sdf, SETTINGS, Rng())
    assert "(defined by the geometry;" in convert(sdf, scene("dmtet"), SETTINGS, Rng())[0]


def test_equal_parts_go_on_with_what_they_have_learned(nerf: Scene) -> None:
    environment = {"background": {"type": "environment"}}
    done, next_stage = scene("nerf", seed=1, **environment), scene("nerf", material={"type": "diffuse"}, **environment)
    done.prepare_step(7, Rng())
    lines = convert(done, next_stage, SETTINGS, Rng())
    assert lines == [
        "system.init_from: background: trained weights are kept",
        "system.init_from: geometry: trained weights are kept",
    ]
    for part in ("geometry", "background", "renderer"):
        ours, theirs = getattr(next_stage, part).state_dict(), getattr(done, part).state_dict()
        assert ours and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert next_stage.step == 7
    next_stage.prepare_step(2, Rng())
    assert next_stage.step == 9


def test_a_run_takes_over_the_scene_of_another_representation(nerf: Scene, caplog: pytest.LogCaptureFixture) -> None:
    data = registry.build(parse_component("data", {"type": "random-camera", "height": 8, "width": 8}))
    prior = registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": 8}))
    runtime = {"prior": prior, "prompt": "red left blob", "cameras": data, "rng": Rng()}
    first = parse_component("system", {"type": "text-to-3d", **BLOCKS["nerf"]})
    second = parse_component(
        "system", {"type": "text-to-3d", **BLOCKS["dmtet"], "particles": 2, "conversion": {"resolution": 32}}
    )
    state = {f"scenes.0.{name}": value for name, value in nerf.state_dict().items()}
    system = registry.build(second, **runtime)
    with caplog.at_level(logging.INFO, logger="scoredist3d"):
        system.init_from(state, first)
    assert any("surface fused from renders of the depth" in record.getMessage() for record in caplog.records)
    ours, theirs = (made.state_dict() for made in system.scenes)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert error_of(system.scenes[0])[0] < 0.03


def test_an_empty_field_cannot_be_converted() -> None:
    empty = scene("nerf")
    with torch.no_grad():
        empty.geometry.network.biases[-1][0] = -50.0
    with pytest.raises(ValueError, match="no surface: densities lie in"):
        convert(empty, scene("dmtet"), SETTINGS, Rng())


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"normal": "finite-difference", "grid": {**GRID["grid"], "coarse_to_fine": {"start_level": 2}}}, True),
        ({"radius": 2.0}, False),
        ({"density_blob": "none"}, False),
        ({"grid": {**GRID["grid"], "per_level_scale": 1.7}}, False),
    ],
)
def test_equal_shapes_do_not_make_equal_meanings(changes: dict[str, Any], alike: bool) -> None:
    ours = parse_component("geometry", BLOCKS["nerf"]["geometry"])
    theirs = parse_component("geometry", {**BLOCKS["nerf"]["geometry"], **changes})
    assert weights_compatible(ours, theirs) is alike


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in ("geometry", "material", "background") for n in registry.names(k)]
)
def test_free_options_exist(kind: str, name: str) -> None:
    entry = registry.lookup(kind, name)
    if name == "image-canvas" or any(
        f.default is MISSING and f.default_factory is MISSING for f in own_fields(entry.config_cls)
    ):
        return
    block = parse_component(kind, {"type": name})
    assert weights_compatible(block, block)
