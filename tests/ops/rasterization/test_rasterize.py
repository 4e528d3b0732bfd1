"""Visible triangles and barycentric coordinates: known coverage, a ray tracing oracle, all backends, gradients."""

import math

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.ops import native
from scoredist3d.ops.gather import blend_rows, gather_rows
from scoredist3d.ops.rasterization.rasterize import Fragments, interpolate, rasterize

needs_native = pytest.mark.skipif(not native.available(), reason=f"no C kernels: {native.unavailable_reason()}")
CPU_BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


def from_pixels(points, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Clip positions (1, V, 4), w = 1, of pixel coordinates (x, y[, z]) from the top left corner."""
    points = torch.as_tensor(points, dtype=torch.float64)
    x, y = points[:, 0] * 2 / width - 1, 1 - points[:, 1] * 2 / height
    z = points[:, 2] if points.shape[1] > 2 else torch.zeros_like(x)
    return torch.stack((x, y, z, torch.ones_like(x)), dim=1)[None].to(dtype)


def random_scene(seed: int, batch: int = 2, count: int = 60, dtype: torch.dtype = torch.float32):
    """Triangles around the camera and across its plane, in clip space with near 0.1 and far 10."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(batch, 40, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1.0, 2.0])
    camera = orbit(*(torch.tensor([x]) for x in (0.0, 0.0, 3.0, 60.0)), 24, 32)
    projection = camera.projection(0.1, 10.0)[0].double()
    clip = torch.nn.functional.pad(points, (0, 1), value=1.0) @ projection.T
    faces = torch.stack([torch.randperm(40, generator=generator)[:3] for _ in range(count)])
    return clip.to(dtype), faces.int()


def trace(clip: torch.Tensor, faces: torch.Tensor, height: int, width: int):
    """Oracle that solves ``sum_i b_i (X_i, Y_i, w_i) = (x, y, 1)`` per pixel and triangle in float64.

    Returns the triangle + 1, its weights, and the margin by which the decision is unambiguous.
    """
    x = (torch.arange(width, dtype=torch.float64) + 0.5) * 2 / width - 1
    y = 1 - (torch.arange(height, dtype=torch.float64) + 0.5) * 2 / height
    rays = torch.stack((*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width, dtype=torch.float64)), dim=-1)
    corners = clip.double()[:, faces.long()]  # (B, F, 3, 4)
    matrix = corners[..., [0, 1, 3]].transpose(-1, -2)
    right = rays.reshape(-1, 3).T.expand(*matrix.shape[:2], 3, height * width)
    b = torch.linalg.solve(matrix, right).transpose(-1, -2).reshape(*matrix.shape[:2], height, width, 3)
    scale = b.sum(dim=-1, keepdim=True)  # 1 / w of the hit
    depth = torch.einsum("bfhwk,bfk->bfhw", b, corners[..., 2])
    weights = b / scale
    margin = torch.minimum(weights.amin(dim=-1), 1 - depth.abs())
    hit = (b > 0).all(dim=-1) & (depth.abs() <= 1)
    depth = torch.where(hit, depth, torch.inf)
    near = depth.amin(dim=1)
    index = depth.argmin(dim=1)
    two = depth.topk(2, dim=1, largest=False).values
    gap = torch.where(two[:, 1].isinf(), torch.inf, two[:, 1] - two[:, 0])
    chosen = weights.gather(1, index[:, None, ..., None].expand(-1, -1, -1, -1, 3))[:, 0]
    triangle = torch.where(near.isinf(), 0, index + 1).int()
    return triangle, chosen, torch.minimum(margin.abs().amin(dim=1), gap), near


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_quad_covers_exactly_its_pixels(backend):
    clip = from_pixels([[2, 1], [6, 1], [6, 4], [2, 4]], 6, 8)
    found = rasterize(clip, torch.tensor([[0, 1, 2], [0, 2, 3]]), 6, 8, backend=backend)
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:6] = True  # rows from the top
    assert torch.equal(found.mask[0], expected)
    assert found.triangle[0, 1, 5] == 1 and found.triangle[0, 3, 2] == 2 and found.triangle.dtype == torch.int32
    assert (found.depth[~found.mask] == 1).all() and (found.barycentric[~found.mask] == 0).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_top_and_left_edges_are_included(backend):
    clip = from_pixels([[1.5, 1.5], [4.5, 1.5], [4.5, 3.5], [1.5, 3.5]], 8, 8)  # all sides run through pixel centres
    found = rasterize(clip, torch.tensor([[0, 1, 2], [2, 3, 0]]), 8, 8, backend=backend)
    rows, columns = found.mask[0].nonzero(as_tuple=True)
    assert sorted(set(rows.tolist())) == [1, 2] and sorted(set(columns.tolist())) == [1, 2, 3] and len(rows) == 6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_shared_edges_are_claimed_once(backend):
    """Lattice with edges and vertices at pixel centers, in perspective, drawn one triangle at a time."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(0, 9) * 2 + 0.5
    lattice = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).reshape(-1, 2)
    inner = (lattice > 1).all(dim=1) & (lattice < 16).all(dim=1)
    lattice = lattice + inner[:, None] * torch.randint(-1, 2, lattice.shape, generator=generator) * 0.5
    quads = torch.tensor(
        [[r * 9 + c, r * 9 + c + 1, r * 9 + c + 10, r * 9 + c + 9] for r in range(8) for c in range(8)]
    )
    faces = torch.cat((quads[:, [0, 1, 2]], quads[:, [2, 3, 0]]))
    flip = torch.rand(len(faces), generator=generator) < 0.5  # winding must not matter
    faces[flip] = faces[flip].flip(1)
    clip = from_pixels(lattice, 32, 32)
    clip = clip * (2.0 ** torch.randint(-2, 3, (1, len(lattice), 1), generator=generator))  # exact scales of w
    claims = torch.zeros(32, 32, dtype=torch.int64)
    for face in faces:
        claims += rasterize(clip, face[None], 32, 32, backend=backend).mask[0]
    expected = torch.zeros_like(claims)
    expected[:16, :16] = 1
    assert torch.equal(claims, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_both_sides_are_drawn_and_the_first_of_equals_is_seen(backend):
    clip = from_pixels([[1, 1], [7, 2], [3, 7]], 8, 8)
    front = rasterize(clip, torch.tensor([[0, 1, 2]]), 8, 8, backend=backend)
    back = rasterize(clip, torch.tensor([[1, 0, 2], [0, 1, 2]]), 8, 8, backend=backend)
    assert torch.equal(front.triangle, back.triangle) and front.mask.sum() > 10
    torch.testing.assert_close(back.barycentric, front.barycentric.flip(-1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nearer_triangle_and_clipping_by_depth(backend):
    square = [[0, 0], [8, 0], [8, 8], [0, 8]]
    depths = (0.5, -0.25, -1.5, 1.5)  # the last two lie outside the frustum
    points = [[x, y, z] for z in depths for x, y in square]
    faces = torch.tensor([[4 * k + a, 4 * k + b, 4 * k + c] for k in range(4) for a, b, c in ((0, 1, 2), (2, 3, 0))])
    found = rasterize(from_pixels(points, 8, 8), faces, 8, 8, backend=backend)
    assert set(found.triangle.unique().tolist()) == {3, 4}
    torch.testing.assert_close(found.depth, torch.full((1, 8, 8), -0.25))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ground_plane_through_the_eye_plane(backend):
    """A floor one unit below the camera, from behind it to far ahead, fills the image up to a known row."""
    camera = orbit(*(torch.tensor([x]) for x in (0.0, 0.0, 1.0, 90.0)), 32, 32)
    floor = torch.tensor([[-50.0, -50, -1], [-50, 50, -1], [50, 50, -1], [50, -50, -1]])
    clip = torch.nn.functional.pad(floor, (0, 1), value=1.0) @ (camera.projection(0.01, 200.0) @ camera.w2c)[0].T
    assert (clip[:, 3] < 0).any() and (clip[:, 3] > 0).any()
    found = rasterize(clip[None], torch.tensor([[0, 1, 2], [0, 2, 3]]), 32, 32, backend=backend)
    rows = torch.arange(32)
    slope = (rows + 0.5 - 16) / 16  # fall of the ray per unit ahead; the floor ends 51 ahead
    expected = (slope > 1 / 51)[:, None].expand(32, 32)
    assert torch.equal(found.mask[0], expected)
    points = interpolate(floor, found, torch.tensor([[0, 1, 2], [0, 2, 3]]))[0]
    ahead = 1 - points[..., 0]
    torch.testing.assert_close(ahead[expected], (1 / slope)[:, None].expand(32, 32)[expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_against_ray_tracing(backend, seed):
    clip, faces = random_scene(seed)
    expected, weights, margin, depth = trace(clip, faces, 24, 32)
    found = rasterize(clip, faces, 24, 32, backend=backend)
    differ = found.triangle != expected
    assert int((differ & (margin > 1e-9)).sum()) == 0 and int(differ.sum()) <= 2
    both = found.mask & ~differ
    assert int(both.sum()) > 300
    exact = rasterize(clip.double(), faces, 24, 32, backend="torch")
    assert torch.equal(exact.triangle, found.triangle)
    # float32 may lose digits on the few slivers seen almost edge-on
    for result, tolerance in ((exact, 1e-9), (found, 1e-3)):
        torch.testing.assert_close(
            result.barycentric[both].double(), weights[both][:, :2], rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(result.depth[both].double(), depth[both], rtol=tolerance, atol=tolerance)
    error = (found.barycentric[both].double() - weights[both][:, :2]).abs().amax(dim=1)
    assert float(error.median()) < 1e-6


@needs_native
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("height", "width"), [(24, 32), (1, 1), (17, 5), (3, 61)])
def test_native_sees_exactly_the_same_triangles(seed, height, width):
    clip, faces = random_scene(10 + seed, batch=3, count=200)
    expected = rasterize(clip, faces, height, width, backend="torch").triangle
    assert torch.equal(rasterize(clip, faces, height, width, backend="native").triangle, expected)


@needs_native
def test_native_does_not_depend_on_the_threads():
    clip, faces = random_scene(3, count=300)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaf = clip.clone().requires_grad_()
            found = rasterize(leaf, faces, 37, 41, backend="native")
            interpolate(leaf[..., :3], found, faces).square().sum().backward()
            results.append((found.triangle, leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_to_draw(backend):
    clip = torch.zeros(2, 0, 4, requires_grad=True)
    faces = torch.empty(0, 3, dtype=torch.int64)
    found = rasterize(clip, faces, 4, 5, backend=backend)
    assert found.triangle.shape == (2, 4, 5) and not found.mask.any()
    image = interpolate(torch.zeros(0, 3), found, faces, backend=backend)
    assert torch.equal(image, torch.zeros(2, 4, 5, 3))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_degenerate_and_non_finite_triangles_are_left_out(backend, bad):
    clip = from_pixels([[0, 0], [8, 0], [0, 8], [4, 4], [8, 8]], 8, 8)
    clip[0, 4, 0] = bad
    faces = torch.tensor([[0, 0, 1], [1, 2, 3], [0, 1, 4], [0, 1, 2]])  # a line, a line, a bad corner, a triangle
    found = rasterize(clip, faces, 8, 8, backend=backend)
    assert set(found.triangle.unique().tolist()) == {0, 4}


def test_gradients_against_finite_differences():
    clip, faces = random_scene(2, count=12, dtype=torch.float64)
    clip = clip.requires_grad_()
    generator = torch.Generator().manual_seed(1)
    attributes = torch.randn(40, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    own = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    own_faces = torch.randint(0, 7, faces.shape, generator=generator)

    def render(clip, attributes, own):
        found = rasterize(clip, faces, 5, 6)
        assert int(found.mask.sum()) > 20
        shared = interpolate(attributes, found, faces)
        separate = interpolate(own, found, faces, attribute_faces=own_faces)
        return shared, separate, found.depth

    assert torch.autograd.gradcheck(render, (clip, attributes, own), eps=1e-7, atol=1e-5)


@needs_native
@pytest.mark.parametrize("batched", [False, True])
def test_native_gradients_equal_torch(batched):
    clip, faces = random_scene(5, count=100)
    generator = torch.Generator().manual_seed(2)
    attributes = torch.randn(*((2,) if batched else ()), 40, 5, generator=generator)
    upstream = torch.randn(2, 40, 50, 5, generator=generator)
    results = []
    for backend in ("native", "torch"):
        c, a = clip.clone().requires_grad_(), attributes.clone().requires_grad_()
        found = rasterize(c, faces, 40, 50, backend=backend)
        image = interpolate(a, found, faces, backend=backend)
        loss = (image * upstream).sum() + found.depth.square().sum()
        results.append((image, found.depth, *torch.autograd.grad(loss, (a, c))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * float(reference.detach().abs().max()))


@needs_native
def test_rows_native_equals_torch_and_second_order():
    generator = torch.Generator().manual_seed(3)
    table, weights = torch.randn(9, 3, generator=generator), torch.randn(50, 4, generator=generator)
    index = torch.randint(0, 9, (50, 4), generator=generator)
    results = []
    for backend in ("native", "torch"):
        t, w = table.clone().requires_grad_(), weights.clone().requires_grad_()
        out = blend_rows(t, index, w, backend=backend)
        rows = gather_rows(t, index, backend=backend)
        first = torch.autograd.grad(rows.pow(3).sum(), t, create_graph=True)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), (t, w)), rows, first))
        results[-1] += torch.autograd.grad(first.square().sum(), t)
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-3)


def test_interpolation_is_perspective_correct():
    """The world position interpolated at a pixel projects to the center of the pixel."""
    camera = orbit(*(torch.tensor([x]) for x in (20.0, 30.0, 2.0, 60.0)), 20, 28)
    points = torch.tensor([[0.0, -1, -1], [0.5, 1, -1], [-0.5, 0.3, 1]])
    matrix = (camera.projection() @ camera.w2c)[0]
    faces = torch.tensor([[0, 1, 2]])
    found = rasterize((torch.nn.functional.pad(points, (0, 1), value=1.0) @ matrix.T)[None], faces, 20, 28)
    world = interpolate(points, found, faces)[found.mask]
    rays = camera.rays()
    offset = world - rays.origins[found.mask]
    direction = torch.nn.functional.normalize(offset, dim=1)
    torch.testing.assert_close(direction, rays.directions[found.mask], rtol=0, atol=1e-6)
    assert len(world) > 50


def test_errors():
    clip, faces = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match=r"clip must be \(B, V, 4\)"):
        rasterize(clip[0], faces, 4, 4)
    with pytest.raises(ValueError, match=r"faces must be integers \(F, 3\)"):
        rasterize(clip, faces.float(), 4, 4)
    with pytest.raises(ValueError, match="vertices 0 to 3, but there are only 3"):
        rasterize(clip, torch.tensor([[0, 1, 3]]), 4, 4)
    with pytest.raises(ValueError, match="height and width must be 1 or more"):
        rasterize(clip, faces, 0, 4)
    with pytest.raises(ValueError, match="unknown backend 'magic'"):
        rasterize(clip, faces, 4, 4, backend="magic")
    with pytest.raises(ValueError, match="nvdiffrast"):
        rasterize(clip, faces, 4, 4, backend="nvdiffrast")
    found = rasterize(clip, faces, 4, 4)
    assert isinstance(found, Fragments)
    with pytest.raises(ValueError, match=r"attributes must be \(V, C\) or \(1, V, C\)"):
        interpolate(torch.zeros(2, 3, 1), found, faces)
    with pytest.raises(ValueError, match=r"attribute_faces .* must have the shape"):
        interpolate(torch.zeros(3, 1), found, faces, attribute_faces=torch.zeros(2, 3, dtype=torch.int64))
