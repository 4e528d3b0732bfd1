"""Parts shared by hash-grid fields and textures: parameters and their names, coarse to fine, regression."""

import re

import pytest
import torch
from shared.surface_scenes import build, icosphere
from torch import Tensor

from scoredist3d.geometry.base import Geometry, GeometryInit
from scoredist3d.geometry.texture_field import PointField
from scoredist3d.meshes.sampling import points_near
from scoredist3d.nn.hash_network import HashGridConfig, HashNetwork, NetworkConfig
from scoredist3d.seeding import Rng

GRID = {"num_levels": 5, "log2_hashmap_size": 11, "base_resolution": 8, "coarse_to_fine": {"start_level": 2}}
STARTS = [
    ("implicit-volume", {}),
    ("implicit-sdf", {"shape_init_resolution": 16}),
    ("dmtet", {"resolution": 16, "fix_texture": True}),
    ("flexicubes", {"resolution": 12, "sdf_source": "network"}),
    ("textured-mesh", {"texture": "field"}),
]


def geometry_of(kind: str, **options) -> Geometry:
    return build("geometry", kind, {"rng": Rng(1)}, **({"grid": GRID} | options))


def look(points: Tensor) -> Tensor:
    """A smooth function that two coarse levels can represent."""
    return 3.0 * torch.sin(3.0 * points)


def started(kind: str, options: dict) -> tuple[Geometry, str]:
    geometry = geometry_of(kind, **options)
    return geometry, geometry.init_from(GeometryInit(icosphere(0.6), features=look), Rng(2))


def on_surface(count: int = 2000) -> Tensor:
    return points_near(icosphere(0.6), 0.0, torch.zeros(()))(torch.Generator().manual_seed(9), count)


def test_a_field_and_a_texture_are_one_network():
    """Equal generators give equal parameters and values; the names in the state are those of earlier versions."""
    volume = geometry_of("implicit-volume", num_features=2)
    config = volume.config
    texture = PointField(config.grid, config.network, num_outputs=3, radius=1.0, generator=Rng(1)("geometry"))
    ours, theirs = texture.state_dict(), volume.state_dict()
    assert list(ours) == list(theirs)
    assert set(ours) == {"table", *(f"network.{kind}.{layer}" for kind in ("weights", "biases") for layer in (0, 1))}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    points = on_surface(50)
    torch.testing.assert_close(texture(points)[:, 1:], volume(points).features)
    for step in (0, 150, 10_000):
        for one in (volume, texture):
            one.update_step(step)
        assert volume.num_active_levels == texture.num_active_levels
    assert isinstance(volume, HashNetwork) and isinstance(texture, HashNetwork)


@pytest.mark.parametrize(("kind", "options"), STARTS)
def test_a_start_is_what_training_sees_at_every_level(kind, options):
    """The fit uses the levels of step 0, and activating the other levels does not change the values."""
    geometry, _ = started(kind, options)
    points = on_surface()
    with torch.no_grad():
        geometry.update_step(0)
        first, density = geometry.features_at(points), geometry.density(1.1 * points)
        geometry.update_step(10_000)
        torch.testing.assert_close(geometry.features_at(points), first)
        torch.testing.assert_close(geometry.density(1.1 * points), density)
    assert (first - look(points)).square().mean().sqrt() < 0.45  # of 3


@pytest.mark.parametrize(("kind", "options"), STARTS[1:])
def test_the_error_told_is_the_one_at_step_0(kind, options):
    geometry, said = started(kind, options)
    geometry.update_step(0)
    told = float(re.search(r"RMS error of ([\d.]+(?:e-\d+)?)", said).group(1))
    points = on_surface()
    with torch.no_grad():
        found = (geometry.features_at(points) - look(points)).square().mean().sqrt().item()
    assert found == pytest.approx(told, rel=0.3)


def test_finer_levels_can_still_learn_after_a_start():
    geometry, _ = started("implicit-volume", {})
    geometry.update_step(10_000)
    (geometry.features_at(on_surface(200)) - 1.0).square().sum().backward()
    fine = geometry.spec.offsets[2]
    assert (geometry.table[fine:] == 0).all() and (geometry.table.grad[fine:] != 0).any()


def test_a_fit_leaves_what_is_trained_and_the_level_as_they_were():
    texture = PointField(
        HashGridConfig(num_levels=3, log2_hashmap_size=8, base_resolution=4),
        NetworkConfig(),
        num_outputs=3,
        radius=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    texture.table.requires_grad_(False)
    texture.num_active_levels = 1
    before = texture.table.clone()
    assert texture.fit(look, points_near(icosphere(0.6), 0.0, texture.table), Rng()) < 0.3
    assert not texture.table.requires_grad and texture.network.weights[0].requires_grad
    assert texture.num_active_levels == 1 and not torch.equal(texture.table, before)

    def broken(points: Tensor) -> Tensor:
        raise RuntimeError("no look")

    with pytest.raises(RuntimeError, match="no look"):
        texture.fit(broken, points_near(icosphere(0.6), 0.0, texture.table), Rng())
    assert not texture.table.requires_grad and texture.num_active_levels == 1
