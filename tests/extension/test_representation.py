"""A new representation is one short file: it trains, resumes, renders, exports and converts like the built-in ones."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared.gltf_files import GlbFile
from shared.tiny_runs import Recorder, plain

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component, validate
from scoredist3d.evaluation.surface_distance import chamfer_distance
from scoredist3d.geometry.base import Geometry, GeometryInit
from scoredist3d.geometry.protocols import (
    HasDensity,
    HasGaussians,
    HasSDFGrid,
    HasSignedDistance,
    HasSurface,
    Initializable,
)
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.sampling import mesh_points
from scoredist3d.seeding import Rng
from scoredist3d.systems.conversion import ConversionConfig, convert
from scoredist3d.systems.scene import Scene, SceneShape
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.run import run_training

MOST_LINES = 150
TRI_PLANE: dict[str, Any] = {"type": "tri-plane", "resolution": 8, "channels": 4, "hidden_width": 8}
DMTET: dict[str, Any] = {"type": "dmtet", "resolution": 32, "grid": {"num_levels": 5, "log2_hashmap_size": 12}}


@pytest.fixture(autouse=True)
def extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the tri-plane, whose classes are registered for one test."""
    for kind in ("geometry", "loss"):
        known = {name: registry.lookup(kind, name) for name in registry.names(kind)}
        monkeypatch.setitem(registry._entries, kind, known)
    monkeypatch.delitem(sys.modules, "extension.triplane", raising=False)
    yield importlib.import_module("extension.triplane")
    sys.modules.pop("extension.triplane", None)


def config(folder: Path, **changes: Any) -> Any:
    raw = plain(folder, trainer={"max_steps": 4})
    loss = {"sparsity": 0.1, "orientation": 0.1, "plane-variation": 1.0}
    raw["system"] |= {"geometry": TRI_PLANE, "loss": loss} | changes
    return raw


def train(raw: Any, **options: Any) -> Any:
    return run_training(validate(raw), devices="cpu", console=Recorder(), **options)


def weights(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(folder / "ckpts" / "last.ckpt")["state_dict"]
    return state


def scene(geometry: dict[str, Any], renderer: str) -> Scene:
    block = parse_component("system", {"type": "text-to-3d", "geometry": geometry, "renderer": {"type": renderer}})
    return Scene(block.geometry, block.material, block.background, block.renderer, rng=Rng())


def ellipsoid() -> Mesh:
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=3)
    vertices = ball.vertices * [0.6, 0.45, 0.35] + [0.05, -0.1, 0.1]
    return Mesh(vertices.astype(np.float32), np.asarray(ball.faces, np.int64))


def colors(points: torch.Tensor) -> torch.Tensor:
    return 0.5 + 0.3 * torch.sin(2.0 * points + points.new_tensor([0.3, 1.1, 2.3]))


def check_object(made: Scene, fits: int) -> None:
    """Shape and colors are those of the ellipsoid after ``fits`` fits of a tri-plane."""
    shape, truth = SceneShape(made), mesh_points(ellipsoid(), 3000, np.random.default_rng(0))
    found = mesh_points(find_surface(shape, 48).mesh, 3000, np.random.default_rng(1))
    # Two samples of one surface are 0.015 apart. A fit shifts the surface by up to half a texel (0.032).
    assert chamfer_distance(found, truth) < 0.015 + 0.032 * fits
    points = torch.from_numpy(truth[:1000]).float()
    assert (shape.channels(points).base_color - colors(points)).abs().mean() < 0.08


def test_a_representation_fits_into_one_short_file(extension: Any) -> None:
    assert len(Path(extension.__file__).read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_it_trains_renders_resumes_and_exports(tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole"))
    assert len(GlbFile(whole.paths["glb"]).faces) > 20
    assert list(whole.folder.rglob("*.png"))
    raw = config(tmp_path / "half")
    half = train(raw | {"trainer": {"max_steps": 2}})
    start, end = weights(half.folder), weights(whole.folder)
    assert not torch.equal(start["scenes.0.geometry.planes"], end["scenes.0.geometry.planes"])
    resumed = weights(train(raw, resume=half.folder).folder)
    assert resumed.keys() == end.keys() and all(torch.equal(resumed[name], end[name]) for name in end)


def test_it_is_the_target_and_the_source_of_conversions() -> None:
    settings = ConversionConfig(resolution=48)
    first, second = (scene({"type": "tri-plane"}, "volume") for _ in range(2))
    between = scene(DMTET, "mesh-rasterizer")
    source = GeometryInit(ellipsoid(), features=lambda points: torch.logit(colors(points)))
    assert isinstance(first.geometry, Initializable)
    assert "RMS error" in first.geometry.init_from(source, Rng())
    check_object(first, 1)
    convert(first, between, settings, Rng())
    check_object(between, 1)
    convert(between, second, settings, Rng())
    check_object(second, 2)


def test_normals_point_outwards(extension: Any) -> None:
    field = registry.build(parse_component("geometry", TRI_PLANE), rng=Rng())
    with torch.no_grad():
        field.planes.zero_()  # leaves the initial ball
    points = torch.nn.functional.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), dim=-1) / 2
    torch.testing.assert_close(field(points, with_normal=True).normal, 2 * points, atol=1e-3, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    fine = config(Path("nowhere"))["system"]
    parse_component("system", fine)
    with pytest.raises(ConfigError, match=r"mesh-rasterizer cannot render tri-plane; use volume"):
        parse_component("system", fine | {"renderer": {"type": "mesh-rasterizer"}})
    with pytest.raises(ConfigError, match=r"loss\.eikonal: the term needs a signed distance field, which tri-plane"):
        parse_component("system", fine | {"loss": {"eikonal": 0.1}})
    with pytest.raises(ConfigError, match=r"loss\.plane-variation: the term needs a TriPlane, which implicit-volume"):
        parse_component("system", fine | {"geometry": {"type": "implicit-volume"}})


def test_a_geometry_without_initialization_is_refused_as_a_target(extension: Any) -> None:
    target = scene({"type": "tri-plane"}, "volume")
    assert isinstance(target.geometry, extension.TriPlane)
    bare = type("Bare", (Geometry,), {"density": extension.TriPlane.density, "features_at": None})
    assert not issubclass(bare, (HasDensity, HasSurface, HasGaussians, Initializable))
    target.geometry = bare(target.blocks["geometry"])
    with pytest.raises(ValueError, match="tri-plane cannot be initialized from another representation"):
        convert(scene(DMTET, "mesh-rasterizer"), target, ConversionConfig(resolution=16), Rng())


CAPABILITIES = (HasDensity, HasSignedDistance, HasSurface, HasSDFGrid, HasGaussians)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tri-plane", {HasDensity}),
        ("implicit-volume", {HasDensity}),
        ("implicit-sdf", {HasDensity, HasSignedDistance}),
        ("dmtet", {HasSurface, HasSDFGrid}),
        ("flexicubes", {HasSurface, HasSDFGrid}),
        ("textured-mesh", {HasSurface}),
        ("gaussians", {HasGaussians}),
    ],
)
def test_capabilities_of_each_representation(name: str, expected: set[type]) -> None:
    """The class, as the config validation sees it, and an instance, as renderers see it, agree."""
    cls = registry.lookup("geometry", name).cls
    made = registry.build(parse_component("geometry", {"type": name}), rng=Rng())
    for capability in CAPABILITIES:
        assert issubclass(cls, capability) == isinstance(made, capability) == (capability in expected), capability
    assert issubclass(cls, Initializable)
