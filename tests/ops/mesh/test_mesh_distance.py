"""Distance to meshes: analytic shapes, agreement of the backends, winding numbers, gradients."""

import math

import pytest
import torch

from scoredist3d.ops import native
from scoredist3d.ops.isosurface.marching_tetrahedra import marching_tetrahedra
from scoredist3d.ops.isosurface.tetrahedra import TetrahedralGrid, generate
from scoredist3d.ops.mesh.distance import closest_point, signed_distance, winding_number

needs_native = pytest.mark.skipif(not native.available(), reason="the C kernels cannot be built here")
BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


def box() -> tuple[torch.Tensor, torch.Tensor]:
    """Box [-0.5, 0.5] x [-0.3, 0.3] x [-0.2, 0.2] with outward orientation."""
    vertices = torch.cartesian_prod(torch.tensor([-0.5, 0.5]), torch.tensor([-0.3, 0.3]), torch.tensor([-0.2, 0.2]))
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    return vertices, torch.cat((quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]))


def box_distance(points: torch.Tensor) -> torch.Tensor:
    beyond = points.abs() - torch.tensor([0.5, 0.3, 0.2], dtype=points.dtype)
    return beyond.clamp(min=0).norm(dim=1) + beyond.amax(dim=1).clamp(max=0)


def sphere(resolution: int = 16, center: tuple[float, float, float] = (0, 0, 0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Sphere of radius 0.6."""
    grid = TetrahedralGrid(**generate(resolution), spacing=2 / resolution)
    vertices, faces = marching_tetrahedra(grid.vertices, grid.vertices.norm(dim=1) - 0.6, grid)
    return vertices + torch.tensor(center), faces


def scattered(count: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * (torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1)


def soup(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unconnected triangles of various sizes, including needles and points."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 1, 3, generator=generator) * 2 - 1
    size = 10 ** (-3 * torch.rand(count, 1, 1, generator=generator))
    triangles = corners + size * torch.randn(count, 3, 3, generator=generator)
    triangles[::7, 2] = triangles[::7, 0] + 0.4 * (triangles[::7, 1] - triangles[::7, 0])  # no area
    triangles[::11] = triangles[::11, :1]  # a point
    return triangles.reshape(-1, 3), torch.arange(3 * count).view(-1, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_box(backend):
    points = scattered(2000)
    assert torch.allclose(signed_distance(points, *box(), backend=backend), box_distance(points), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sphere(backend):
    vertices, faces = sphere()
    points = scattered(500)
    error = signed_distance(points, vertices, faces, backend=backend) - (points.norm(dim=1) - 0.6)
    # Interpolation over a grid edge l = 0.25 errs by up to l^2 / (8 r), and the faces lie below their corners.
    assert error.abs().max() < 2 * 0.25**2 / 8 / 0.6
    assert error.mean() > 0  # the mesh is inscribed


@needs_native
@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 17, 500])
def test_native_equals_torch(count):
    vertices, faces = soup(count, seed=count)
    points = torch.cat((scattered(400, seed=1, scale=1.5), vertices[:20], vertices[faces[:20]].mean(dim=1)))
    tree, plain = (closest_point(points, vertices, faces, backend=name) for name in ("native", "torch"))
    distances = [(points - found.points).norm(dim=1) for found in (tree, plain)]
    assert torch.allclose(*distances, atol=2e-6)
    for found in (tree, plain):
        assert (found.barycentric >= 0).all() and torch.allclose(found.barycentric.sum(dim=1), torch.ones(()))
        assert torch.allclose((found.barycentric[..., None] * vertices[faces[found.faces]]).sum(dim=1), found.points)


@needs_native
def test_native_equals_torch_on_a_surface():
    vertices, faces = sphere(24)
    points = torch.cat((scattered(300), vertices[:300] * 1.001, vertices[:300] * 0.99))
    tree, plain = (signed_distance(points, vertices, faces, backend=name) for name in ("native", "torch"))
    assert torch.allclose(tree, plain, atol=1e-6)


@needs_native
def test_threads_and_order_of_points_do_not_matter():
    vertices, faces = sphere()
    points = scattered(1000)
    whole = signed_distance(points, vertices, faces, backend="native")
    assert torch.equal(signed_distance(points.flip(0), vertices, faces, backend="native").flip(0), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(signed_distance(points, vertices, faces, backend="native"), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closest_point_on_one_triangle(backend):
    """Points closest to each of the seven regions: the face, three sides, three corners."""
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    faces = torch.tensor([[0, 1, 2]])
    cases = {
        (0.25, 0.25, 0.7): (0.25, 0.25, 0),
        (0.5, -0.4, 0.1): (0.5, 0, 0),
        (-0.3, 0.6, -0.1): (0, 0.6, 0),
        (0.9, 0.7, 0.2): (0.6, 0.4, 0),
        (-0.2, -0.3, 0.4): (0, 0, 0),
        (1.5, -0.1, 0.0): (1, 0, 0),
        (-0.1, 2.0, 0.3): (0, 1, 0),
    }
    found = closest_point(torch.tensor(list(cases)), vertices, faces, backend=backend)
    assert torch.allclose(found.points, torch.tensor(list(cases.values())), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_winding_number_of_closed_meshes(backend):
    vertices, faces = sphere()
    points = scattered(500)
    radius = points.norm(dim=1)
    points, inside = points[(radius - 0.6).abs() > 0.02], (radius < 0.6)[(radius - 0.6).abs() > 0.02]
    winding = winding_number(points, vertices, faces, backend=backend)
    tolerance = 1e-4 if backend == "torch" else 0.06
    assert (winding - inside.float()).abs().max() < tolerance
    assert (winding_number(points, vertices, faces.flip(1), backend=backend) + inside).abs().max() < tolerance


@needs_native
def test_accuracy_of_the_expansion():
    vertices, faces = soup(300, seed=3)
    points = scattered(500, seed=4, scale=2.0)
    exact = winding_number(points, vertices, faces, backend="torch")
    errors = [
        float((winding_number(points, vertices, faces, backend="native", accuracy=a) - exact).abs().max())
        for a in (1.5, 3.0, 6.0, 1000.0)
    ]
    assert errors[0] < 0.2 and errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]
    assert errors[3] < 1e-4


@needs_native
def test_order_of_the_expansion():
    """The error of dipole and first moment decreases with the fourth power of the distance."""
    vertices, faces = soup(40, seed=5)
    vertices = 0.1 * vertices
    direction = torch.tensor([[0.48, -0.6, 0.64]])
    errors = []
    for distance in (2.0, 4.0):
        exact = winding_number((distance * direction).double(), vertices.double(), faces, backend="torch")
        coarse = winding_number(distance * direction, vertices, faces, backend="native", accuracy=1.01)
        errors.append(abs(float(coarse.double() - exact)))
    assert 10 < errors[0] / errors[1] < 25


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_mesh_keeps_its_inside(backend):
    """Sphere without a cap: the winding number is its solid angle over 4 pi, and the center is inside."""
    vertices, faces = sphere(20)
    open_faces = faces[vertices[faces].mean(dim=1)[:, 2] < 0.4]
    points = torch.tensor([[0.0, 0, 0], [0, 0, -0.5], [0, 0, 0.3], [0, 0, 0.9], [0.9, 0, 0], [0, 0, -0.7]])
    distance = signed_distance(points, vertices, open_faces, backend=backend)
    assert (distance < 0).tolist() == [True, True, True, False, False, False]
    cap = (1 - 0.4 / 0.6) / 2  # share of the sphere above z = 0.4, seen from the centre
    winding = winding_number(points[:1], vertices, open_faces, backend=backend, accuracy=4.0)
    assert winding.item() == pytest.approx(1 - cap, abs=0.03)


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlapping_spheres(backend):
    """The overlap of two spheres has winding number 2 and is inside."""
    first, second = sphere(12, (-0.3, 0, 0)), sphere(12, (0.3, 0, 0))
    vertices = torch.cat((first[0], second[0]))
    faces = torch.cat((first[1], second[1] + len(first[0])))
    points = torch.tensor([[0.0, 0, 0], [-0.6, 0, 0], [0.6, 0, 0], [0, 0.8, 0]])
    winding = winding_number(points, vertices, faces, backend=backend, accuracy=4.0)
    assert torch.allclose(winding, torch.tensor([2.0, 1, 1, 0]), atol=0.02)
    assert (signed_distance(points, vertices, faces, backend=backend) < 0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_the_unit_normal(backend):
    vertices, faces = box()
    points = scattered(300).requires_grad_()
    signed_distance(points, vertices, faces, backend=backend).sum().backward()
    assert torch.allclose(points.grad.norm(dim=1), torch.ones(()), atol=1e-4)
    outside = points.detach().clone().requires_grad_()
    box_distance(outside).sum().backward()
    apart = box_distance(points.detach()) > 0.01
    assert torch.allclose(points.grad[apart], outside.grad[apart], atol=1e-4)


def test_gradcheck():
    vertices, faces = box()
    points = scattered(20, seed=2).double().requires_grad_()
    corners = vertices.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, v: signed_distance(p, v, faces), (points, corners))


@pytest.mark.parametrize("backend", BACKENDS)
def test_points_on_the_surface(backend):
    vertices, faces = box()
    points = torch.cat((vertices, vertices[faces].mean(dim=1))).requires_grad_()
    distance = signed_distance(points, vertices, faces, backend=backend)
    distance.sum().backward()
    assert distance.abs().max() < 1e-7 and torch.isfinite(points.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_points(backend):
    assert signed_distance(torch.zeros(0, 3), *box(), backend=backend).shape == (0,)


def test_works_without_the_kernels(monkeypatch):
    monkeypatch.setattr("scoredist3d.ops.backends._automatic", lambda *_: "torch")
    assert signed_distance(torch.zeros(1, 3), *box()).item() == pytest.approx(-0.2)


def test_bad_arguments():
    vertices, faces = box()
    points = scattered(3)
    with pytest.raises(ValueError, match="no faces"):
        signed_distance(points, vertices, faces[:0])
    with pytest.raises(ValueError, match="faces refer to vertices 0 to 7, but there are only 5"):
        signed_distance(points, vertices[:5], faces)
    with pytest.raises(ValueError, match=r"must be \(N, 3\)"):
        closest_point(points[:, :2], vertices, faces)
    with pytest.raises(ValueError, match="finite"):
        winding_number(points * math.inf, vertices, faces)
    with pytest.raises(ValueError, match="the same dtype"):
        winding_number(points.double(), vertices, faces)
    with pytest.raises(ValueError, match="accuracy"):
        winding_number(points, vertices, faces, accuracy=0.5)
    with pytest.raises(ValueError, match="unknown backend"):
        winding_number(points, vertices, faces, backend="abacus")


@pytest.mark.gpu
def test_same_on_cuda():
    vertices, faces = sphere()
    points = scattered(1000)
    expected = signed_distance(points, vertices, faces)
    found = signed_distance(points.cuda(), vertices.cuda(), faces.cuda())
    assert torch.allclose(found.cpu(), expected, atol=1e-5)
