"""The hash-grid signed distance field: initial shapes, extinction, gradients, initialization from another object."""

import math

import numpy as np
import pytest
import torch
import trimesh
from torch.nn import functional as F

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry import GeometryInit
from scoredist3d.geometry.implicit_sdf import ImplicitSDF
from scoredist3d.geometry.trilinear import distance_grid, trilinear
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.sampling import points_in_ball, points_near, surface_sampler
from scoredist3d.nn.regression import fit_features
from scoredist3d.seeding import Rng

SMALL_GRID = {"num_levels": 3, "log2_hashmap_size": 8, "base_resolution": 4, "backend": "torch"}


def field(kind: str = "implicit-sdf", **options) -> ImplicitSDF:
    return registry.build(parse_component("geometry", {"type": kind, **options}), rng=Rng(1))


def rough(geometry: ImplicitSDF, scale: float = 0.3) -> ImplicitSDF:
    """The same field with a nonzero network."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        geometry.table.uniform_(-scale, scale, generator=generator)
        geometry.network.weights[-1][0].uniform_(-scale, scale, generator=generator)
    return geometry


def ball_points(count: int, radius: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return points_in_ball(torch.Generator().manual_seed(0), count, radius).to(dtype)


def box(x: float = 0.6, y: float = 0.4, z: float = 0.3) -> Mesh:
    made = trimesh.creation.box((2 * x, 2 * y, 2 * z))
    return Mesh(made.vertices.astype("float32"), made.faces.astype("int64"))


def box_distance(points: torch.Tensor, x: float = 0.6, y: float = 0.4, z: float = 0.3) -> torch.Tensor:
    beyond = points.abs() - points.new_tensor([x, y, z])
    return beyond.clamp_min(0).norm(dim=-1) + beyond.amax(-1).clamp_max(0)


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_the_object_starts_exactly_as_a_sphere(radius):
    geometry, points = field(radius=radius, shape_init_size=0.4), ball_points(100, radius)
    torch.testing.assert_close(geometry.sdf(points), points.norm(dim=-1) - 0.4 * radius)
    output = geometry(points, with_normal=True)
    torch.testing.assert_close(output.sdf, geometry.sdf(points))
    torch.testing.assert_close(output.density, geometry.extinction(points))
    away = points.norm(dim=-1) > 0.2 * radius
    torch.testing.assert_close(output.normal[away], F.normalize(points, dim=-1)[away], atol=0.03, rtol=0)


def test_an_ellipsoid_is_exact_on_its_surface_and_first_order_around_it():
    axes = (0.8, 0.5, 0.3)
    geometry = field(shape_init="ellipsoid", shape_init_axes=axes).double()
    scale = torch.tensor(axes, dtype=torch.float64)
    unit = F.normalize(torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1)
    surface = unit * scale
    outward = F.normalize(surface / scale.square(), dim=-1)
    torch.testing.assert_close(geometry.sdf(surface), torch.zeros(200, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(
        geometry.sdf(surface + 1e-4 * outward), torch.full((200,), 1e-4, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert geometry.sdf(torch.zeros(1, 3, dtype=torch.float64)).item() == pytest.approx(-0.3, rel=0.01)


def test_extinction_is_the_laplace_distribution_function():
    geometry = field(beta=0.05, min_beta=0.01, shape_init_size=0.5)
    for distance in (-0.3, -0.02, 0.02, 0.3):
        point = torch.tensor([[0.5 + distance, 0.0, 0.0]])
        tail = 0.5 * math.exp(-abs(distance) / 0.05)
        expected = (tail if distance > 0 else 1 - tail) / 0.05
        assert geometry.extinction(point).item() == pytest.approx(expected, rel=1e-4)
    assert geometry.extinction(torch.tensor([[1.01, 0.0, 0.0]])).item() == 0.0
    assert geometry.beta.item() == pytest.approx(0.05)
    with torch.no_grad():
        geometry.log_beta.fill_(-50.0)
    assert geometry.beta.item() == pytest.approx(0.01)


def test_radius_is_a_change_of_units():
    small, large = rough(field(radius=1.0, grid=SMALL_GRID)), rough(field(radius=2.0, grid=SMALL_GRID))
    points = ball_points(100)
    a, b = small(points), large(2 * points)
    torch.testing.assert_close(b.sdf, 2 * a.sdf)
    torch.testing.assert_close(b.density, a.density / 2)
    torch.testing.assert_close(large.density(2 * points), small.density(points), atol=1e-4, rtol=1e-3)


def test_exported_surface_is_the_zero_level():
    geometry = field(shape_init="ellipsoid", shape_init_axes=(0.8, 0.5, 0.3))
    assert geometry.iso_level == 1.0
    points = torch.tensor([[0.8, 0.0, 0.0], [0.0, 0.5, 0.0]])
    torch.testing.assert_close(geometry.density(points), torch.ones(2), atol=1e-3, rtol=0)
    with torch.no_grad():
        mesh = find_surface(Exported(geometry), 48).mesh
        wrong = geometry.sdf(torch.from_numpy(mesh.vertices)).abs()
    assert wrong.max() < 2e-3
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.8 * 0.5 * 0.3, rel=0.01)


class Exported:
    """Adapter that exposes a geometry to the surface extraction."""

    def __init__(self, geometry):
        self.geometry = geometry
        self.radius, self.iso_level, self.device = geometry.radius, geometry.iso_level, torch.device("cpu")
        self.density = geometry.density

    def surface(self):
        return None


@pytest.mark.parametrize("normal", ["analytic", "finite-difference"])
@pytest.mark.parametrize("start", ["sphere", "mesh"])
def test_all_gradients_match_finite_differences(normal, start):
    """Directional derivatives of a mix of extinction, features, normals and gradient lengths, in float64."""
    geometry = rough(field(grid=SMALL_GRID, normal=normal, shape_init_resolution=16))
    if start == "mesh":
        geometry._set_base(distance_grid(box(), 1.0, 16))
    geometry = geometry.double()
    points = 0.9 * ball_points(40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(40, 9, generator=generator, dtype=torch.float64)

    def functional() -> torch.Tensor:
        output = geometry(points, with_normal=True)
        lengths = geometry.sdf_gradient(points).norm(dim=-1, keepdim=True)
        columns = [output.density[:, None], output.sdf[:, None], output.features, output.normal, lengths]
        return (torch.cat(columns, dim=-1) * mix).sum()

    parameters = list(geometry.parameters())
    assert any(p is geometry.log_beta for p in parameters)
    for parameter, gradient in zip(parameters, torch.autograd.grad(functional(), parameters), strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(sign * direction)
            values.append(functional().item())
            with torch.no_grad():
                parameter.sub_(sign * direction)
        expected = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("normal", ["analytic", "finite-difference"])
def test_gradient_has_the_length_of_a_distance(normal):
    geometry = field(normal=normal, shape_init_size=0.5)
    points = ball_points(200)
    points = points[points.norm(dim=-1) > 0.3]
    gradient = geometry.sdf_gradient(points)
    torch.testing.assert_close(gradient, F.normalize(points, dim=-1), atol=0.02, rtol=0)
    with torch.no_grad():
        assert not geometry.sdf_gradient(points).requires_grad


def test_trilinear_is_exact_for_what_is_linear_along_each_axis():
    axis = torch.linspace(-2, 2, 9, dtype=torch.float64)
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    grid = 1 + 2 * x - y + 0.5 * z + x * y - y * z + 0.3 * x * y * z
    points = ball_points(300, 2.0, torch.float64)
    px, py, pz = points.unbind(-1)
    expected = 1 + 2 * px - py + 0.5 * pz + px * py - py * pz + 0.3 * px * py * pz
    torch.testing.assert_close(trilinear(grid, points, 2.0), expected)
    corner = torch.full((1, 3), 2.0, dtype=torch.float64)
    torch.testing.assert_close(trilinear(grid, corner, 2.0), grid[-1:, -1, -1])
    torch.testing.assert_close(trilinear(grid, 3 * corner, 2.0), grid[-1:, -1, -1])


def test_a_mesh_file_is_where_the_object_starts(tmp_path):
    trimesh.creation.box((2.4, 1.6, 1.2)).export(tmp_path / "box.ply")
    geometry = field(shape_init="mesh", shape_init_mesh=str(tmp_path / "box.ply"), shape_init_size=0.7)
    reach = math.sqrt(1.2**2 + 0.8**2 + 0.6**2)
    sides = [0.7 * side / reach for side in (1.2, 0.8, 0.6)]
    points = ball_points(500)
    # Files may turn axes, so compare with all orders of the sides.
    wrong = (geometry.sdf(points) - box_distance(points, *sides)).abs()
    other = (geometry.sdf(points) - box_distance(points, sides[0], sides[2], sides[1])).abs()
    assert min(wrong.mean(), other.mean()) < 0.005 and min(wrong.max(), other.max()) < 0.03


def test_state_keeps_the_base():
    geometry = rough(field(grid=SMALL_GRID, shape_init_resolution=16))
    geometry._set_base(distance_grid(box(), 1.0, 16))
    fresh = field(grid=SMALL_GRID, shape_init_resolution=16)
    fresh.load_state_dict(geometry.state_dict())
    points = ball_points(50)
    assert torch.equal(fresh.sdf(points), geometry.sdf(points))
    fresh.load_state_dict(field(grid=SMALL_GRID, shape_init_resolution=16).state_dict())
    torch.testing.assert_close(fresh.sdf(points), points.norm(dim=-1) - 0.5)


def painted(points: torch.Tensor) -> torch.Tensor:
    """Different features on each face."""
    return 3.0 * torch.tanh(8.0 * points)


@pytest.mark.parametrize("kind", ["implicit-sdf", "implicit-volume"])
def test_another_object_is_taken_over(kind):
    """Surface and features of a colored box are recovered, deterministically and with a bounded number of queries."""
    results = []
    for _ in range(2):
        geometry, asked = field(kind), []

        def look(points: torch.Tensor, asked: list[int] = asked) -> torch.Tensor:
            asked.append(len(points))
            return painted(points)

        said = geometry.init_from(GeometryInit(box(), look), Rng(3))
        assert sum(asked) < 1_000_000
        results.append((geometry, said))
    (geometry, said), (again, same) = results
    assert said == same and "RMS error" in said and all(p.grad is None for p in geometry.parameters())
    assert all(torch.equal(a, b) for a, b in zip(geometry.parameters(), again.parameters(), strict=True))
    points = ball_points(4000)
    distance = box_distance(points)
    with torch.no_grad():
        if kind == "implicit-sdf":
            assert (geometry.sdf(points) - distance).abs().mean() < 0.005
        inside = geometry.extinction(points) > 10.0 / geometry.radius
        clear = distance.abs() > (0.12 if kind == "implicit-sdf" else 0.06)
        assert ((inside == (distance < 0))[clear]).float().mean() > 0.995
        surface = points_near(box(), 0.0, points)(torch.Generator().manual_seed(9), 2000)
        wrong = (geometry.features_at(surface) - painted(surface)).square().mean().sqrt()
    assert wrong < 0.4  # of 3


def test_fit_features_reaches_a_linear_target_and_leaves_the_rest():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    other = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((3, 2), 7.0)
    wanted = torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])

    def points(generator, count):
        return torch.randn(count, 3, generator=generator)

    error = fit_features(lambda p: p @ weight * other, lambda p: p @ wanted, [weight], points, Rng(), lr=0.05)
    assert error < 0.01 and torch.allclose(weight, wanted, atol=0.01)
    assert (weight.grad == 7.0).all() and (other == 1).all() and other.grad is None


def test_points_near_a_mesh_are_uniform_by_area():
    points = points_near(box(0.6, 0.4, 0.3), 0.0, torch.zeros(()))(torch.Generator().manual_seed(0), 20_000)
    assert box_distance(points).abs().max() < 1e-5
    on_x = (points[:, 0].abs() > 0.6 - 1e-5).float().mean().item()
    share = 0.4 * 0.3 / (0.6 * 0.4 + 0.6 * 0.3 + 0.4 * 0.3)
    assert on_x == pytest.approx(share, abs=0.01)
    moved = points_near(box(), 0.05, torch.zeros(()))(torch.Generator().manual_seed(0), 20_000)
    # Close to a face, the standard deviation of the distance is the spread; edges reduce it slightly.
    assert box_distance(moved).square().mean().sqrt().item() == pytest.approx(0.05, rel=0.1)


def test_points_on_a_mesh_come_with_the_normals_of_their_faces():
    """Degenerate faces are never sampled, and a mesh with only degenerate faces is rejected."""
    whole = box(0.6, 0.4, 0.3)
    flat = Mesh(whole.vertices, np.concatenate([[[0, 0, 1]], whole.faces, [[2, 2, 2]]]))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    (points, normals), (same, _) = (
        surface_sampler(mesh, torch.zeros(()))(generator, 3000)
        for mesh, generator in zip((flat, whole), generators, strict=True)
    )
    assert torch.equal(points, same)
    moved = points + 0.01 * normals
    torch.testing.assert_close(box_distance(moved), torch.full((3000,), 0.01), atol=1e-5, rtol=0)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(3000))
    with pytest.raises(ValueError, match="has no area"):
        points_near(Mesh(whole.vertices, np.array([[0, 0, 1]])), 0.1, torch.zeros(()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape_init": "mesh"}, "shape_init_mesh: shape_init: mesh needs a mesh file"),
        ({"shape_init_mesh": "a.obj"}, "is not used with shape_init: sphere"),
        ({"beta": 0.002}, "beta: must be larger than min_beta"),
        ({"shape_init": "torus"}, "shape_init"),
        ({"shape_init_size": 0}, "shape_init_size"),
        ({"grid": {"num_levels": 4, "coarse_to_fine": {"start_level": 5}}}, "start_level"),
    ],
)
def test_bad_distance_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        field(**options)


def test_parameter_groups_hold_every_parameter_of_the_distance_once():
    geometry = field()
    groups = {group["name"]: group["params"] for group in geometry.parameter_groups()}
    assert set(groups) == {"encoding", "network", "beta"}
    grouped = [id(parameter) for params in groups.values() for parameter in params]
    assert sorted(grouped) == sorted(id(parameter) for parameter in geometry.parameters())
