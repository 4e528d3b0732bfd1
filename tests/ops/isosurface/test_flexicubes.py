"""FlexiCubes: the tables case by case, known surfaces, topology, weights, gradients."""

import math

import pytest
import torch

from scoredist3d.ops.isosurface.flexicubes import (
    _EDGE_CORNERS,
    cube_loops,
    flexi_weights,
    flexicubes,
    pinched_faces,
    voxel_grid,
)
from scoredist3d.ops.mesh.regularizers import vertex_normals
from scoredist3d.ops.mesh.topology import euler_characteristic, is_closed


def sphere(points: torch.Tensor, radius: float = 0.6) -> torch.Tensor:
    return points.norm(dim=-1) - radius


def torus(points: torch.Tensor) -> torch.Tensor:
    ring = points[..., :2].norm(dim=-1) - 0.55
    return (ring.square() + points[..., 2].square()).sqrt() - 0.25


def volume(vertices: torch.Tensor, faces: torch.Tensor) -> float:
    a, b, c = vertices[faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


@pytest.mark.parametrize("joined", [False, True])
def test_loops_of_all_cases(joined):
    """Crossed edges are in loops of three or more, and loops are numbered from 0 without a gap."""
    for case in range(256):
        loops = cube_loops(case, joined_face=next(iter(pinched_faces(case, cube_loops(case))), -1) if joined else -1)
        for edge, (a, b) in enumerate(_EDGE_CORNERS):
            assert (loops[edge] >= 0) == bool((case >> a ^ case >> b) & 1)
        names = [loop for loop in loops if loop >= 0]
        assert set(names) == set(range(len(set(names))))
        assert all(names.count(loop) >= 3 for loop in set(names))


def test_no_case_stays_pinched():
    """At most one face of a cube has all four edges in one loop, and joining it creates no other such face."""
    pinched = 0
    for case in range(256):
        faces = pinched_faces(case, cube_loops(case))
        assert len(faces) <= 1
        if faces:
            pinched += 1
            assert pinched_faces(case, cube_loops(case, joined_face=faces[0])) == []
    assert pinched == 36


def test_known_cases():
    one = cube_loops(0b1)
    assert sorted(edge for edge in range(12) if one[edge] == 0) == [0, 4, 8]  # the three edges at corner 0
    opposite_corners = cube_loops(0b10000001)
    assert max(opposite_corners) == 1
    across_a_face = cube_loops(0b1001)  # corners 0 and 3, parted on the face x = 0
    assert max(across_a_face) == 1
    half = cube_loops(0b1111)  # x = 0 inside: a loop of the four edges along x
    assert [edge for edge in range(12) if half[edge] >= 0] == [0, 1, 2, 3] and max(half) == 0


@pytest.mark.parametrize(("field", "euler"), [(sphere, 2), (torus, 0)])
@pytest.mark.parametrize("subdivide", [False, True])
def test_known_surfaces(field, euler, subdivide):
    errors = []
    for resolution in (16, 32):
        grid = voxel_grid(resolution)
        mesh = flexicubes(grid.vertices, field(grid.vertices), grid, subdivide=subdivide)
        assert is_closed(mesh.faces) and euler_characteristic(mesh.faces) == euler
        assert torch.equal(mesh.faces.unique(), torch.arange(len(mesh.vertices)))
        errors.append(float(field(mesh.vertices).abs().max()))
        # A mean of crossings lies within a cube's diagonal of them, on a surface of curvature at most 1 / 0.25.
        assert errors[-1] < 3 * grid.spacing**2 / 2 / 0.25
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize("subdivide", [False, True])
def test_normals_point_outwards(subdivide):
    grid = voxel_grid(32)
    mesh = flexicubes(grid.vertices, sphere(grid.vertices), grid, subdivide=subdivide)
    assert volume(mesh.vertices, mesh.faces) == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.015)
    radial = mesh.vertices / mesh.vertices.norm(dim=1, keepdim=True)
    assert (vertex_normals(mesh.vertices, mesh.faces) * radial).sum(dim=1).min() > 0.97


@pytest.mark.parametrize("subdivide", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_any_field_gives_a_closed_manifold(seed, subdivide):
    """Noise has every sign pattern, including faces that are pinched on both sides."""
    grid = voxel_grid(14)
    noise = torch.randn(len(grid.vertices), generator=torch.Generator().manual_seed(seed)) + 0.4 * (seed - 2)
    sdf = torch.where(grid.vertices.abs().amax(dim=1) > 0.99, 1.0, noise)
    mesh = flexicubes(grid.vertices, sdf, grid, subdivide=subdivide)
    assert len(mesh.faces) > 1000 and is_closed(mesh.faces)
    assert volume(mesh.vertices, mesh.faces) > 0


def test_dual_vertices_by_hand():
    """Only the center of a 2^3 grid is inside: the dual vertex of each cube is the mean of its three crossings."""
    grid = voxel_grid(2)
    sdf = torch.where(grid.vertices.norm(dim=1) == 0, -1.0, 3.0)
    mesh = flexicubes(grid.vertices, sdf, grid)
    signs = torch.cartesian_prod(*(3 * [torch.tensor([-1.0, 1.0])]))
    assert torch.allclose(mesh.vertices, signs * 0.25 / 3)  # crossings at a quarter of each edge
    assert len(mesh.faces) == 12 and torch.allclose(mesh.deviation, torch.zeros(8), atol=1e-6)
    assert volume(mesh.vertices, mesh.faces) == pytest.approx((2 * 0.25 / 3) ** 3)


def test_weights_by_hand():
    grid = voxel_grid(2)
    sdf = torch.where(grid.vertices.norm(dim=1) == 0, -1.0, 3.0)
    raw = torch.zeros(8, 21)
    # Last cube, x, y, z in [0, 1]: its corner 0 is the inner one. Edges 0, 4, 8 leave it along x, y, z.
    raw[7, 0] = math.atanh(0.5 / 0.99)  # alpha 1.5 at the inner corner: u = 1.5 / (1.5 + 3) along each edge
    raw[7, 8 + 4] = math.atanh(0.8 / 0.99)  # beta 1.8 along y
    mesh = flexicubes(grid.vertices, sdf, grid, raw)
    assert torch.allclose(mesh.vertices[7], torch.tensor([1.0, 1.8, 1.0]) / 3.8 / 3, atol=1e-6)
    crossings = torch.eye(3) / 3
    lengths = (mesh.vertices[7] - crossings).norm(dim=1)
    assert torch.allclose(mesh.deviation[7], (lengths - lengths.mean()).abs().mean(), atol=1e-6)


def test_gamma_chooses_the_diagonal():
    grid = voxel_grid(2)
    sdf = torch.where(grid.vertices.norm(dim=1) == 0, -1.0, 3.0)
    raw = torch.zeros(8, 21)
    raw[[0, 3, 5, 6], 20] = 2.0  # cubes with an even number of upper sides: diagonals of the faces of the dual cube
    for favoured in (raw, -raw):
        mesh = flexicubes(grid.vertices, sdf, grid, favoured)
        ends = torch.tensor([0, 3, 5, 6] if favoured is raw else [1, 2, 4, 7])
        uses = torch.bincount(mesh.faces.reshape(-1), minlength=8)
        assert (uses[ends] == 6).all() and uses.sum() == 36 and is_closed(mesh.faces)
    middle = flexicubes(grid.vertices, sdf, grid, raw, subdivide=True)
    assert middle.vertices.shape == (8 + 6, 3) and len(middle.faces) == 24


def test_zero_weights_change_nothing():
    grid = voxel_grid(8)
    sdf = torus(grid.vertices)
    plain, weighted = (flexicubes(grid.vertices, sdf, grid, raw) for raw in (None, torch.zeros(512, 21)))
    assert torch.equal(plain.vertices, weighted.vertices) and torch.equal(plain.faces, weighted.faces)


def test_weights_stay_positive():
    weights = flexi_weights(torch.full((2, 21), -100.0))
    assert min(weights.alpha.min(), weights.beta.min(), weights.gamma.min()) >= 0.00499
    neutral = flexi_weights(torch.zeros(1, 21))
    assert (neutral.alpha == 1).all() and (neutral.beta == 1).all() and (neutral.gamma == 0.5).all()


def test_gradients():
    grid = voxel_grid(4)
    generator = torch.Generator().manual_seed(0)
    points = (grid.vertices + 0.05 * torch.randn(grid.vertices.shape, generator=generator)).double()
    sdf = sphere(points, 0.63)
    raw = torch.randn(64, 21, generator=generator).double()
    assert sdf.abs().min() > 1e-3
    inputs = (points.requires_grad_(), sdf.detach().requires_grad_(), raw.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda v, s, w: tuple(flexicubes(v, s, grid, w, subdivide=True)[::2]), inputs, fast_mode=True
    )


def test_descent_moves_the_sphere():
    grid = voxel_grid(12)
    sdf = sphere(grid.vertices, 0.7).requires_grad_()
    raw = torch.zeros(grid.num_cubes, 21, requires_grad=True)
    optimizer = torch.optim.Adam([sdf, raw], lr=0.01)
    for _ in range(80):
        mesh = flexicubes(grid.vertices, sdf, grid, raw, subdivide=True)
        loss = (mesh.vertices.norm(dim=1) - 0.45).square().mean() + 0.01 * mesh.deviation.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mesh = flexicubes(grid.vertices, sdf, grid, raw)
    assert mesh.vertices.norm(dim=1).mean().item() == pytest.approx(0.45, abs=0.01)
    assert is_closed(mesh.faces) and raw.abs().max() > 0.05


def test_exact_zeros():
    grid = voxel_grid(8)
    sdf = (grid.vertices.abs().sum(dim=1) - 0.5).requires_grad_()
    assert (sdf == 0).sum() > 10
    mesh = flexicubes(grid.vertices, sdf, grid)
    assert is_closed(mesh.faces) and torch.isfinite(mesh.vertices).all()
    (mesh.vertices.square().sum() + mesh.deviation.sum()).backward()
    assert torch.isfinite(sdf.grad).all()


@pytest.mark.parametrize("subdivide", [False, True])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_no_surface(value, subdivide):
    grid = voxel_grid(3)
    sdf = torch.full((64,), value, requires_grad=True)
    mesh = flexicubes(grid.vertices, sdf, grid, torch.zeros(27, 21), subdivide=subdivide)
    assert mesh.vertices.shape == (0, 3) and mesh.faces.shape == (0, 3) and mesh.deviation.shape == (0,)
    mesh.vertices.sum().backward()


def test_bad_arguments():
    grid = voxel_grid(3)
    sdf = sphere(grid.vertices)
    with pytest.raises(ValueError, match="resolution"):
        voxel_grid(0)
    with pytest.raises(ValueError, match="raw_weights must be"):
        flexicubes(grid.vertices, sdf, grid, torch.zeros(26, 21))
    with pytest.raises(ValueError, match="must be"):
        flexicubes(grid.vertices, sdf[1:], grid)
    with pytest.raises(ValueError, match="not finite"):
        flexicubes(grid.vertices, sdf / 0, grid)


@pytest.mark.gpu
def test_same_on_cuda():
    grid = voxel_grid(16)
    sdf = torus(grid.vertices)
    mesh = flexicubes(grid.vertices, sdf, grid)
    on_gpu = flexicubes(grid.vertices.cuda(), sdf.cuda(), grid.to("cuda"))
    assert torch.equal(on_gpu.faces.cpu(), mesh.faces)
    assert torch.allclose(on_gpu.vertices.cpu(), mesh.vertices, atol=1e-6)
