"""Normals, regularizers and connectivity of shapes with known values."""

import math

import pytest
import torch

from scoredist3d.ops.mesh.regularizers import (
    edge_length,
    face_normals,
    laplacian,
    normal_consistency,
    normal_variation,
    vertex_normals,
)
from scoredist3d.ops.mesh.topology import edge_faces, euler_characteristic, is_closed

PHI = (1 + math.sqrt(5)) / 2


def tetrahedron() -> tuple[torch.Tensor, torch.Tensor]:
    """Regular tetrahedron with edge 2 sqrt(2), centered, with outward orientation."""
    vertices = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    return vertices, torch.tensor([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])


def icosahedron() -> tuple[torch.Tensor, torch.Tensor]:
    """Regular icosahedron with edge 2, centered, with outward orientation."""
    corners = [(0.0, s, t * PHI) for s in (-1, 1) for t in (-1, 1)]
    vertices = torch.tensor([(p[-k], p[1 - k], p[2 - k]) for k in range(3) for p in corners], dtype=torch.float64)
    near = (torch.cdist(vertices, vertices) - 2).abs() < 1e-6
    triples = [
        (a, b, c) for a in range(12) for b in range(a) for c in range(b) if near[a, b] and near[b, c] and near[a, c]
    ]
    faces = torch.tensor(triples)
    a, b, c = vertices[faces].unbind(1)
    inward = (a * torch.linalg.cross(b, c)).sum(dim=1) < 0
    return vertices, torch.where(inward[:, None], faces.flip(1), faces)


def cube() -> tuple[torch.Tensor, torch.Tensor]:
    """Cube [0, 1]^3 of 12 triangles with outward orientation."""
    vertices = torch.cartesian_prod(*(3 * [torch.tensor([0.0, 1.0], dtype=torch.float64)]))
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    return vertices, torch.cat((quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]))


def plane(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Tilted flat patch of size^2 regular quads."""
    axis = torch.arange(size + 1, dtype=torch.float64)
    u, v = torch.cartesian_prod(axis, axis).unbind(1)
    corner = (torch.arange(size)[:, None] * (size + 1) + torch.arange(size)).reshape(-1)
    right, up = corner + size + 1, corner + 1
    faces = torch.cat((torch.stack((corner, right, up), 1), torch.stack((right, right + 1, up), 1)))
    return torch.stack((u, v, 0.5 * u - 0.25 * v), dim=1), faces


def test_shapes_are_what_they_say():
    for vertices, faces in (tetrahedron(), icosahedron(), cube()):
        assert is_closed(faces) and euler_characteristic(faces) == 2
        a, b, c = vertices[faces].unbind(1)
        center = vertices.mean(dim=0)
        outward = (a + b + c) / 3 - center
        assert ((face_normals(vertices, faces) * outward).sum(dim=1) > 0).all()
    assert len(icosahedron()[1]) == 20


def test_edges_and_faces_of_a_strip():
    faces = torch.tensor([[0, 1, 2], [2, 1, 3]])
    found = edge_faces(faces)
    assert found.edges.tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]
    assert found.faces.tolist() == [[0, -1], [0, -1], [0, 1], [1, -1], [1, -1]]
    assert found.counts.tolist() == [1, 1, 2, 1, 1]


def test_edges_and_faces_against_loops():
    _, faces = icosahedron()
    faces = faces[torch.randperm(20, generator=torch.Generator().manual_seed(0))][:17]
    expected: dict[tuple[int, int], list[int]] = {}
    for number, face in enumerate(faces.tolist()):
        for k in range(3):
            a, b = face[k], face[(k + 1) % 3]
            expected.setdefault((min(a, b), max(a, b)), []).append(number)
    found = edge_faces(faces.to(torch.int32))
    assert [tuple(edge) for edge in found.edges.tolist()] == sorted(expected)
    for edge, pair, count in zip(found.edges.tolist(), found.faces.tolist(), found.counts.tolist(), strict=True):
        owners = expected[tuple(edge)]
        assert pair == [*owners, -1][:2] and count == len(owners)


def test_an_edge_with_three_faces():
    found = edge_faces(torch.tensor([[0, 1, 2], [1, 0, 3], [0, 1, 4]]))
    assert found.counts.tolist()[0] == 3 and found.faces.tolist()[0] == [0, 1]


def test_closed_means_oriented_too():
    _, faces = tetrahedron()
    assert is_closed(faces) and is_closed(faces.flip(1))
    assert not is_closed(faces[:3])
    assert not is_closed(torch.cat((faces[:3], faces[3:].flip(1))))
    assert not is_closed(torch.cat((faces, faces[:1])))


def test_face_normals_of_a_cube():
    vertices, faces = cube()
    assert face_normals(vertices, faces)[:6].tolist() == [
        [-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]
    ]  # fmt: skip


def test_vertex_normals():
    vertices, faces = icosahedron()
    assert torch.allclose(vertex_normals(vertices, faces), vertices / vertices.norm(dim=1, keepdim=True))
    # Weighted by area: a corner of the cube's triangulation that has two triangles on one side and one on the others.
    box, sides = cube()
    faces_at = [(face_normals(box, sides)[f] * 0.5) for f in range(12) if 0 in sides[f].tolist()]
    total = torch.stack(faces_at).sum(dim=0)
    assert torch.allclose(vertex_normals(box, sides)[0], total / total.norm())
    unused = torch.cat((box, torch.ones(1, 3).double()))
    assert (vertex_normals(unused, sides)[8] == 0).all()


def test_normal_consistency_closed_forms():
    # Dihedral angles: the normals of a regular tetrahedron have cosine -1/3, of an icosahedron sqrt(5)/3.
    assert normal_consistency(*tetrahedron()).item() == pytest.approx(1 + 1 / 3)
    assert normal_consistency(*icosahedron()).item() == pytest.approx(1 - math.sqrt(5) / 3)
    # Cube: 12 edges at right angles, 6 flat diagonals.
    assert normal_consistency(*cube()).item() == pytest.approx(12 / 18)
    assert normal_consistency(*plane()).item() == pytest.approx(0, abs=1e-12)


def test_normal_variation_closed_forms():
    # ||n_a - n_b||^2 = 2 - 2 cos: 8/3 for a tetrahedron, 2 - 2 sqrt(5)/3 for an icosahedron, 2 at the edges of a cube.
    for tau in (1e-9, 0.05, 0.5):
        for shape, share, squared in (
            (tetrahedron(), 1, 8 / 3),
            (icosahedron(), 1, 2 - 2 * math.sqrt(5) / 3),
            (cube(), 12 / 18, 2),
        ):
            expected = share * (math.sqrt(squared + tau**2) - tau)
            assert normal_variation(*shape, tau=tau).item() == pytest.approx(expected)
        assert normal_variation(*plane(), tau=tau).item() == pytest.approx(0, abs=1e-12)
    assert torch.equal(normal_variation(*cube()), normal_variation(*cube(), tau=0.05))


def folded_strip(angle: float, folds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Strip of ``folds`` + 1 squares in a row that turns by ``angle`` in equal steps."""
    turns = torch.arange(folds + 1, dtype=torch.float64) * angle / folds
    steps = torch.stack([turns.cos(), torch.zeros_like(turns), turns.sin()], 1)
    profile = torch.cat([torch.zeros(1, 3).double(), steps.cumsum(0)])
    vertices = torch.cat([profile, profile + torch.tensor([0.0, 1.0, 0.0])])
    a = torch.arange(folds + 1)
    b, c, d = a + 1, a + folds + 2, a + folds + 3
    return vertices, torch.cat([torch.stack([a, b, d], 1), torch.stack([a, d, c], 1)])


def test_a_crease_costs_the_same_whether_sharp_or_round():
    """The sum over all edges is the length of a polygon on the sphere of normals: between its chord and its arc."""
    angle, sums, squares = math.radians(60), [], []
    for folds in (1, 2, 4, 8):
        vertices, faces = folded_strip(angle, folds)
        pairs = (edge_faces(faces).faces[:, 1] >= 0).sum()
        assert pairs == 2 * folds + 1  # with the flat diagonals
        sums.append((normal_variation(vertices, faces, tau=1e-9) * pairs).item())
        squares.append((normal_consistency(vertices, faces) * pairs).item())
        assert sums[-1] == pytest.approx(2 * folds * math.sin(angle / (2 * folds)))
        # A large tau makes the penalty quadratic, as that of the normal consistency.
        quadratic = normal_variation(vertices, faces, tau=1e3) * pairs * 1e3
        assert quadratic.item() == pytest.approx(squares[-1], rel=1e-4)
    assert sums[0] == pytest.approx(1.0) and sums == sorted(sums) and sums[-1] < angle
    assert squares[-1] < squares[0] / 7, "normal consistency prefers the round edge"


def test_laplacian_closed_forms():
    # Tetrahedron: the mean of the neighbours is -v/3, |v|^2 = 3. Icosahedron: it is v / sqrt(5), |v|^2 = 1 + phi^2.
    assert laplacian(*tetrahedron()).item() == pytest.approx((4 / 3) ** 2 * 3)
    assert laplacian(*icosahedron()).item() == pytest.approx((1 - 1 / math.sqrt(5)) ** 2 * (1 + PHI**2))
    # Inside a regular flat patch it vanishes: moving one inner vertex up by e moves it and its six neighbours.
    vertices, faces = plane(8)
    base = laplacian(vertices, faces).item()
    moved = vertices.clone()
    moved[40] += torch.tensor([0.0, 0.0, 0.6])
    degrees = 6.0
    extra = (0.6**2 + 6 * (0.6 / degrees) ** 2) / len(vertices)
    assert laplacian(moved, faces).item() == pytest.approx(base + extra)


def test_edge_length_closed_forms():
    assert edge_length(*tetrahedron()).item() == pytest.approx(8)
    assert edge_length(*icosahedron()).item() == pytest.approx(4)
    assert edge_length(*icosahedron(), target=2.0).item() == pytest.approx(0)
    assert edge_length(*icosahedron(), target=1.5).item() == pytest.approx(0.25)
    assert edge_length(*cube()).item() == pytest.approx((12 * 1 + 6 * 2) / 18)


def test_adjacency_can_be_shared():
    vertices, faces = cube()
    adjacency = edge_faces(faces)
    for loss in (normal_consistency, normal_variation, laplacian, edge_length):
        assert torch.equal(loss(vertices, faces), loss(vertices, faces, adjacency=adjacency))


@pytest.mark.parametrize(
    "loss", [normal_consistency, normal_variation, laplacian, edge_length, face_normals, vertex_normals]
)
def test_gradients(loss):
    vertices, faces = icosahedron()
    noise = torch.randn(vertices.shape, generator=torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(lambda v: loss(v, faces), ((vertices + 0.2 * noise).requires_grad_(),))


def test_gradient_of_edge_length_with_a_target():
    vertices, faces = icosahedron()
    assert torch.autograd.gradcheck(lambda v: edge_length(v, faces, target=1.7), (vertices.requires_grad_(),))


@pytest.mark.parametrize("loss", [normal_consistency, normal_variation, laplacian, edge_length])
def test_no_faces_cost_nothing(loss):
    vertices = torch.zeros(0, 3, requires_grad=True)
    value = loss(vertices, torch.zeros(0, 3, dtype=torch.int64))
    value.backward()
    assert value.item() == 0 and vertices.grad.shape == (0, 3)


def test_faces_without_an_area():
    """Degenerate faces from a duplicated vertex have zero normals and contribute neither loss nor gradient."""
    vertices, faces = cube()
    vertices = torch.cat((vertices, vertices[:1], vertices[:1])).float().requires_grad_()
    more = torch.cat((faces, torch.tensor([[0, 8, 1], [0, 8, 9]])))
    normals = face_normals(vertices, more)
    assert (normals[12:] == 0).all()
    assert normal_consistency(vertices, more).item() == pytest.approx(12 / 18)
    assert normal_variation(vertices, more, tau=1e-6).item() == pytest.approx(12 / 18 * math.sqrt(2), rel=1e-5)
    (normals.sum() + vertex_normals(vertices, more).sum() + edge_length(vertices, more, target=0.5)).backward()
    assert torch.isfinite(vertices.grad).all() and vertices.grad.abs().max() < 100


@pytest.mark.parametrize("loss", [normal_consistency, normal_variation])
def test_descent_flattens_a_bumpy_patch(loss):
    vertices, faces = plane(5)
    bumps = torch.randn(len(vertices), 1, generator=torch.Generator().manual_seed(1)).double()
    bumpy = (vertices + 0.2 * bumps * torch.tensor([0.0, 0.0, 1.0])).requires_grad_()
    optimizer = torch.optim.Adam([bumpy], lr=0.02)
    before = loss(bumpy, faces).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss(bumpy, faces).backward()
        optimizer.step()
    assert loss(bumpy, faces).item() < 0.1 * before


@pytest.mark.parametrize("faces", [torch.zeros(3, 4).long(), torch.zeros(2, 3), torch.zeros(3).long()])
def test_bad_faces(faces):
    with pytest.raises(ValueError, match="faces must be an integer tensor"):
        edge_faces(faces)
