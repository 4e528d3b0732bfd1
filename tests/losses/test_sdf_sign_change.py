"""The sign change loss: hand-computed values, removal of cavities, and supported geometry."""

import math

import pytest
import torch
from shared.surface_scenes import FixedMesh, build, cube, renderer_of, views

from scoredist3d.config import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.meshes.mesh import topology
from scoredist3d.seeding import Rng

KINDS = ["dmtet", "flexicubes"]
SMALL = {"num_levels": 2, "log2_hashmap_size": 6}


def surface(kind, **options):
    return build("geometry", kind, {"rng": Rng(1)}, **({"resolution": 12, "grid": SMALL} | options))


def value_of(geometry):
    render = renderer_of(geometry)(views(0.0, size=8), step=0)
    return build("loss", "sdf-sign-change")(render, geometry, 0, Rng())


@pytest.mark.parametrize("kind", KINDS)
def test_edges_join_each_pair_of_neighbours_once(kind):
    geometry = surface(kind)
    first, second = geometry.grid_edges().long().unbind(1)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    assert (low < high).all() and len(torch.unique(low * len(geometry.vertices) + high)) == len(low)
    lengths = (geometry.vertices[first] - geometry.vertices[second]).norm(dim=-1)
    assert lengths.max() < 2.01 * geometry.spacing
    if kind == "flexicubes":
        assert len(low) == 3 * 12 * 13**2
        torch.testing.assert_close(lengths, torch.full_like(lengths, geometry.spacing))


@pytest.mark.parametrize("radius", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_one_vertex_inside_by_hand(kind, radius):
    """For s = -0.2 R at one vertex and 0.1 R elsewhere, the value is softplus(0.1) + softplus(0.2) for any radius R."""
    geometry = surface(kind, radius=radius)
    middle = geometry.vertices.norm(dim=-1).argmin()
    with torch.no_grad():
        geometry.sdf.fill_(0.1 * radius)
        geometry.sdf[middle] = -0.2 * radius
    # H(sigmoid(-0.2), 1) = softplus(0.2) and H(sigmoid(0.1), 0) = softplus(0.1).
    expected = math.log1p(math.exp(0.2)) + math.log1p(math.exp(0.1))
    value = value_of(geometry)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert geometry.sdf.grad[middle] < 0, "outwards"
    assert geometry.deform.grad is None
    with torch.no_grad():
        geometry.sdf.fill_(0.1)
    assert value_of(geometry).item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_inner_floater_disappears(kind):
    """The loss closes an invisible cavity within a ball and keeps the outer surface."""
    geometry = surface(kind, shape_init_size=0.7)
    volume = geometry.surface().volume
    with torch.no_grad():
        geometry.sdf[geometry.vertices.norm(dim=-1).argmin()] = 0.05
    assert topology(geometry.surface()).components == 2
    optimizer = torch.optim.SGD([geometry.sdf], lr=1.0)
    for _ in range(10):
        optimizer.zero_grad()
        value_of(geometry).backward()
        optimizer.step()
    assert topology(geometry.surface()).components == 1
    assert geometry.surface().volume == pytest.approx(volume, rel=0.05)


def test_distances_of_a_network_learn():
    geometry = surface("dmtet", sdf_source="network")
    value_of(geometry).backward()
    assert geometry.sdf_network.network.biases[-1].grad.abs().sum() > 0


def test_what_it_is_for():
    with pytest.raises(ValueError, match="FixedMesh has no signed distance grid"):
        value_of(FixedMesh(cube()))
    block = {"type": "text-to-3d", "guidance": {"type": "sds"}, "loss": {"sdf-sign-change": 0.1}}
    for geometry, renderer in (("dmtet", "mesh-rasterizer"), ("flexicubes", "mesh-rasterizer")):
        assert parse_component("system", block | {"geometry": {"type": geometry}, "renderer": {"type": renderer}})
    with pytest.raises(ConfigError, match=r"loss\.sdf-sign-change: the term is for a GridSurface"):
        parse_component("system", block | {"geometry": {"type": "implicit-sdf"}, "renderer": {"type": "volume"}})
