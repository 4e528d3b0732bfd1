"""Losses on meshes against their values on a cube."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from shared.surface_scenes import FixedMesh, build, cube, icosphere, renderer_of, views

from scoredist3d.geometry.base import SurfaceMesh
from scoredist3d.geometry.face_cache import FaceCache
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.mesh.topology import edge_faces
from scoredist3d.seeding import Rng

MESH_TERMS = ["normal-consistency", "normal-variation", "laplacian", "edge-length"]


def value_of(name, geometry, mesh=None, **options):
    render = renderer_of(geometry)(views(0.0, size=8), step=0)
    render = render if mesh is None else replace(render, mesh=mesh)
    return build("loss", name, **options)(render, geometry, 0, Rng())


@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_values_on_a_cube(radius):
    """The cube has 12 edges with right angles and 6 diagonals in its sides; lengths are relative to the radius."""
    geometry = FixedMesh(cube(0.4 * radius), radius=radius)
    assert value_of("normal-consistency", geometry).item() == pytest.approx(12 / 18)
    for tau in (0.05, 1.0):  # normals at right angles differ by sqrt(2)
        expected = 12 / 18 * ((2 + tau**2) ** 0.5 - tau)
        assert value_of("normal-variation", geometry, tau=tau).item() == pytest.approx(expected)
    assert value_of("normal-variation", geometry).item() == value_of("normal-variation", geometry, tau=0.05).item()
    assert value_of("edge-length", geometry).item() == pytest.approx(24 / 18 * 0.8**2)
    spread = (12 * 0.0 + 6 * (2**0.5 * 0.8 - 0.8) ** 2) / 18
    assert value_of("edge-length", geometry, target=0.8).item() == pytest.approx(spread)
    small = value_of("laplacian", FixedMesh(cube(0.4))).item()
    assert small > 0 and value_of("laplacian", geometry).item() == pytest.approx(small)


def test_the_relative_laplacian_forgives_the_start():
    geometry = FixedMesh(cube(0.4))
    rest = torch.from_numpy(cube(0.4).vertices)
    mesh = SurfaceMesh(geometry.vertices, geometry.faces, fixed_topology=True, rest=rest)
    assert value_of("laplacian", geometry, mesh, relative=True).item() == 0.0
    assert value_of("laplacian", geometry, mesh).item() > 0.01
    shifted = replace(mesh, vertices=mesh.vertices + torch.tensor([0.1, 0.2, 0.3]))
    assert value_of("laplacian", geometry, shifted, relative=True).item() == pytest.approx(0.0, abs=1e-12)
    pulled = replace(mesh, vertices=mesh.vertices + 0.1 * torch.eye(8)[:, :3])
    assert value_of("laplacian", geometry, pulled, relative=True).item() > 1e-4


@pytest.mark.parametrize("name", MESH_TERMS)
def test_gradients_smooth_a_dented_sphere(name):
    ball = icosphere(0.5, 2)
    dented = ball.vertices.copy()
    dented[0] *= 0.7
    geometry = FixedMesh(Mesh(dented, ball.faces))
    before = value_of(name, geometry)
    before.backward()
    inwards = -geometry.vertices.grad[0] @ geometry.vertices.detach()[0]
    if name != "edge-length":  # this loss shrinks the whole mesh
        assert inwards > 0, "the dent is to be pushed out"
    with torch.no_grad():
        geometry.vertices -= 1e-3 * geometry.vertices.grad / geometry.vertices.grad.norm()
    assert value_of(name, geometry) < before


@pytest.mark.parametrize("name", MESH_TERMS)
def test_a_mesh_without_faces_costs_nothing(name):
    geometry = FixedMesh(Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64)))
    value = value_of(name, geometry)
    assert value.item() == 0
    value.backward()


def test_a_render_without_a_mesh_is_refused():
    geometry = FixedMesh(cube())
    render = replace(renderer_of(geometry)(views(0.0, size=8), step=0), mesh=None)
    with pytest.raises(ValueError, match="needs renders of a mesh"):
        build("loss", "laplacian")(render, geometry, 0, Rng())


def test_edges_are_found_once_for_faces_that_stay():
    found = []
    cache = FaceCache(lambda faces: found.append(1) or edge_faces(faces))
    faces = torch.from_numpy(cube().faces)
    assert cache(faces) is cache(faces) and len(found) == 1
    faces[0] = faces[0].flip(0)
    cache(faces)
    assert len(found) == 2, "written to, so found anew"
    cache(faces.clone())
    assert len(found) == 3 and len(cache) == 1, "the clone is gone, and what was known of it"


def test_the_deviation_of_dual_vertices():
    """Unequal weights shift dual vertices, which the loss measures relative to the radius; other meshes are refused."""
    values = []
    for radius in (1.0, 3.0):
        grid = {"num_levels": 1, "log2_hashmap_size": 4}
        geometry = build("geometry", "flexicubes", resolution=8, radius=radius, grid=grid)
        even = value_of("dual-deviation", geometry)
        with torch.no_grad():
            geometry.weights[:, 8:20].normal_(generator=torch.Generator().manual_seed(0))
        uneven = value_of("dual-deviation", geometry)
        assert uneven > even
        uneven.backward()
        assert geometry.weights.grad.abs().sum() > 0
        values.append(uneven.item())
        with torch.no_grad():
            geometry.sdf.fill_(1.0)
        assert value_of("dual-deviation", geometry).item() == 0
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    with pytest.raises(ValueError, match="flexicubes"):
        value_of("dual-deviation", FixedMesh(cube()))
