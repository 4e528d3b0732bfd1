"""Marching tetrahedra: known surfaces, topology, gradients."""

import math

import pytest
import torch

from scoredist3d.ops.isosurface.marching_tetrahedra import marching_tetrahedra, sign_change_loss
from scoredist3d.ops.isosurface.tetrahedra import TetrahedralGrid, generate, tetrahedral_grid
from scoredist3d.ops.mesh.regularizers import face_normals, vertex_normals
from scoredist3d.ops.mesh.topology import euler_characteristic, is_closed


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


def sphere(points: torch.Tensor, radius: float = 0.6) -> torch.Tensor:
    return points.norm(dim=-1) - radius


def torus(points: torch.Tensor) -> torch.Tensor:
    ring = points[..., :2].norm(dim=-1) - 0.55
    return (ring.square() + points[..., 2].square()).sqrt() - 0.25


def enclosed_volume(vertices: torch.Tensor, faces: torch.Tensor) -> float:
    a, b, c = vertices[faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def random_field(grid: TetrahedralGrid, seed: int) -> torch.Tensor:
    """Noise with both signs, positive on the boundary: every sign pattern occurs and the surface stays in the grid."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(grid.vertices), generator=generator) + 0.4 * (seed - 2)
    return torch.where(grid.vertices.abs().amax(dim=1) > 0.99, 1.0, noise)


@pytest.mark.parametrize(("field", "euler"), [(sphere, 2), (torus, 0)])
@pytest.mark.parametrize("radius", [None, 1.0])
def test_known_surfaces(field, euler, radius):
    errors = []
    for resolution in (16, 32):
        grid = tetrahedral_grid(resolution, radius)
        vertices, faces = marching_tetrahedra(grid.vertices, field(grid.vertices), grid)
        assert is_closed(faces) and euler_characteristic(faces) == euler
        assert faces.dtype == torch.int64 and torch.equal(faces.unique(), torch.arange(len(vertices)))
        errors.append(float(field(vertices).abs().max()))
        # An edge has at most two spacings and the field at most curvature 1 / 0.25: h^2 / 8 times that.
        assert errors[-1] < (2 * grid.spacing) ** 2 / 8 / 0.25
    assert errors[1] < 0.4 * errors[0]


def test_normals_point_outwards():
    grid = tetrahedral_grid(32)
    vertices, faces = marching_tetrahedra(grid.vertices, sphere(grid.vertices), grid)
    assert enclosed_volume(vertices, faces) == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.015)  # inscribed
    radial = vertices / vertices.norm(dim=1, keepdim=True)
    assert (vertex_normals(vertices, faces) * radial).sum(dim=1).min() > 0.97
    # Faces too small to have a normal say nothing; no other one looks inwards.
    assert (face_normals(vertices, faces) * radial[faces[:, 0]]).sum(dim=1).min() >= 0


@pytest.mark.parametrize("seed", range(5))
def test_any_field_gives_a_closed_manifold(seed):
    grid = tetrahedral_grid(10)
    sdf = random_field(grid, seed)
    vertices, faces = marching_tetrahedra(grid.vertices, sdf, grid)
    assert len(faces) > 1000 and is_closed(faces)
    assert enclosed_volume(vertices, faces) > 0


def test_a_plane_is_met_exactly():
    """Interpolation of a linear field is exact; the surface ends at the boundary of the grid."""
    grid = tetrahedral_grid(8)
    sdf = grid.vertices @ torch.tensor([0.3, -0.2, 0.5]) - 0.11
    vertices, faces = marching_tetrahedra(grid.vertices, sdf, grid)
    assert torch.allclose(vertices @ torch.tensor([0.3, -0.2, 0.5]), torch.tensor(0.11), atol=1e-6)
    normals = face_normals(vertices, faces)
    direction = torch.tensor([0.3, -0.2, 0.5]) / math.sqrt(0.38)
    proper = normals.square().sum(dim=1) > 0.5
    assert proper.float().mean() > 0.95
    assert ((normals[proper] @ direction) > 0.99).all()
    assert not is_closed(faces) and euler_characteristic(faces) == 1


@pytest.mark.parametrize("case", range(1, 15))
def test_one_tetrahedron(case):
    """Every sign pattern against the definition: positions of the crossings, normals from inside to outside."""
    vertices = torch.cat((torch.zeros(1, 3), torch.eye(3))).double()
    edges = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]], dtype=torch.int32)
    tets = torch.arange(4, dtype=torch.int32)[None]
    grid = TetrahedralGrid(vertices.float(), tets, edges, torch.arange(6, dtype=torch.int32)[None], 1.0)
    inside = torch.tensor([bool(case >> corner & 1) for corner in range(4)])
    sdf = torch.where(inside, -1.0, 3.0).double()
    points, faces = marching_tetrahedra(vertices, sdf, grid)
    crossed = [(a, b) for a, b in edges.tolist() if inside[a] != inside[b]]
    expected = torch.stack([(vertices[a] * sdf[b] - vertices[b] * sdf[a]) / (sdf[b] - sdf[a]) for a, b in crossed])
    assert torch.allclose(points, expected)
    assert len(faces) == len(crossed) - 2
    outward = vertices[~inside].mean(dim=0) - vertices[inside].mean(dim=0)
    assert (face_normals(points, faces) @ outward > 0).all()


def test_exact_zeros_are_outside_and_leave_no_hole():
    grid = tetrahedral_grid(16)
    # The L1 ball of radius 0.5: zero at many vertices of the lattice.
    sdf = grid.vertices.abs().sum(dim=1) - 0.5
    assert (sdf == 0).sum() > 10
    sdf = sdf.requires_grad_()
    points = grid.vertices.clone().requires_grad_()
    vertices, faces = marching_tetrahedra(points, sdf, grid)
    assert is_closed(faces) and euler_characteristic(faces) == 2
    assert torch.isfinite(vertices).all()
    vertex_normals(vertices, faces).square().sum().backward()
    assert torch.isfinite(sdf.grad).all() and torch.isfinite(points.grad).all()
    negative_zero = torch.where(sdf.detach() == 0, -0.0, sdf.detach())
    assert torch.equal(marching_tetrahedra(grid.vertices, negative_zero, grid)[1], faces)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_no_surface(value):
    grid = tetrahedral_grid(4)
    sdf = torch.full((len(grid.vertices),), value, requires_grad=True)
    vertices, faces = marching_tetrahedra(grid.vertices, sdf, grid)
    assert vertices.shape == (0, 3) and faces.shape == (0, 3)
    vertices.sum().backward()
    assert (sdf.grad == 0).all()


def test_gradients():
    grid = TetrahedralGrid(**generate(4), spacing=0.5)
    generator = torch.Generator().manual_seed(0)
    points = grid.vertices.double() + 0.05 * torch.randn(grid.vertices.shape, generator=generator).double()
    sdf = sphere(points, 0.63)
    assert sdf.abs().min() > 1e-3  # no sign flips within the finite differences
    inputs = (points.requires_grad_(), sdf.detach().requires_grad_())
    assert torch.autograd.gradcheck(lambda v, s: marching_tetrahedra(v, s, grid)[0], inputs)


def test_descent_on_the_field_moves_the_sphere():
    grid = tetrahedral_grid(16)
    sdf = sphere(grid.vertices, 0.7).requires_grad_()
    optimizer = torch.optim.Adam([sdf], lr=0.01)
    for _ in range(80):
        vertices, _ = marching_tetrahedra(grid.vertices, sdf, grid)
        loss = (vertices.norm(dim=1) - 0.45).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vertices, faces = marching_tetrahedra(grid.vertices, sdf, grid)
    assert vertices.norm(dim=1).mean().item() == pytest.approx(0.45, abs=0.01)
    assert is_closed(faces)


def test_deformed_grid_moves_the_surface_along():
    grid = tetrahedral_grid(8)
    sdf = sphere(grid.vertices)
    vertices, faces = marching_tetrahedra(grid.vertices, sdf, grid)
    moved, same = marching_tetrahedra(2 * grid.vertices + 1, sdf, grid)
    assert torch.equal(faces, same) and torch.allclose(moved, 2 * vertices + 1, atol=1e-6)


def test_bad_arguments():
    grid = tetrahedral_grid(4)
    sdf = sphere(grid.vertices)
    with pytest.raises(ValueError, match="must be"):
        marching_tetrahedra(grid.vertices, sdf[:-1], grid)
    with pytest.raises(ValueError, match="must be"):
        marching_tetrahedra(grid.vertices[:, :2], sdf, grid)
    with pytest.raises(ValueError, match="1 of the 59 sdf values are not finite"):
        marching_tetrahedra(grid.vertices, torch.where(torch.arange(59) == 3, torch.nan, sdf), grid)
    with pytest.raises(ValueError, match="the grid is on meta"):
        marching_tetrahedra(grid.vertices, sdf, grid.to("meta"))


def test_sign_change_loss():
    edges = torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32)
    sdf = torch.tensor([-0.3, 0.5, 0.2], dtype=torch.float64, requires_grad=True)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    # Edges (0, 1) and (0, 2) change sign. H(sigmoid(s), 1) = softplus(-s), H(sigmoid(s), 0) = softplus(s).
    expected = softplus(0.3) + (softplus(0.5) + softplus(0.2)) / 2
    assert sign_change_loss(sdf, edges).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda s: sign_change_loss(s, edges), (sdf,))
    alike = torch.ones(3, requires_grad=True)
    sign_change_loss(alike, edges).backward()
    assert (alike.grad == 0).all()


def test_sign_change_loss_removes_a_floater():
    grid = tetrahedral_grid(8)
    sdf = torch.full((len(grid.vertices),), 0.1)
    sdf[grid.vertices.norm(dim=1).argmin()] = -0.1
    sdf.requires_grad_()
    optimizer = torch.optim.SGD([sdf], lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        sign_change_loss(sdf, grid.edges).backward()
        optimizer.step()
    assert not len(marching_tetrahedra(grid.vertices, sdf, grid)[1])


@pytest.mark.gpu
def test_same_on_cuda():
    grid = tetrahedral_grid(16)
    sdf = torus(grid.vertices)
    vertices, faces = marching_tetrahedra(grid.vertices, sdf, grid)
    on_gpu = marching_tetrahedra(grid.vertices.cuda(), sdf.cuda(), grid.to("cuda"))
    assert torch.equal(on_gpu[1].cpu(), faces) and torch.allclose(on_gpu[0].cpu(), vertices, atol=1e-6)
