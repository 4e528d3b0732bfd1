"""Silhouette antialiasing: exact coverage of straight edges, area derivatives, which edges count, gradients."""

import math

import pytest
import torch
import trimesh

from scoredist3d.cameras import orbit
from scoredist3d.ops import native
from scoredist3d.ops.rasterization.rasterize import antialias, interpolate, mesh_edges, rasterize

needs_native = pytest.mark.skipif(not native.available(), reason=f"no C kernels: {native.unavailable_reason()}")
CPU_BACKENDS = ["torch", pytest.param("native", marks=needs_native)]
SIZE = 48


def to_clip(points: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Clip positions (1, V, 4) of pixel coordinates (x, y[, z])."""
    z = points[:, 2] if points.shape[1] > 2 else torch.zeros_like(points[:, 0])
    x, y = points[:, 0] * 2 / size - 1, 1 - points[:, 1] * 2 / size
    return torch.stack((x, y, z, torch.ones_like(x)), dim=1)[None]


def opacity(points: torch.Tensor, faces: torch.Tensor, backend: str = "auto", clip: torch.Tensor | None = None):
    """Antialiased mask (SIZE, SIZE)."""
    clip = to_clip(points) if clip is None else clip
    found = rasterize(clip, faces, SIZE, SIZE, backend=backend)
    mask = found.mask[..., None].to(clip.dtype)
    return antialias(mask, found, clip, faces, backend=backend)[0, ..., 0]


def disc(rings: int, corners: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Regular polygon with circumradius 1, divided into rings of triangles that get thinner outwards."""
    radii = 1 - (1 - torch.arange(1, rings + 1, dtype=dtype) / rings) ** 2
    angles = torch.arange(corners, dtype=dtype) * (2 * math.pi / corners)
    circle = torch.stack((angles.cos(), angles.sin()), dim=1)
    points = torch.cat((torch.zeros(1, 2, dtype=dtype), (radii[:, None, None] * circle).reshape(-1, 2)))
    faces = [(0, 1 + k, 1 + (k + 1) % corners) for k in range(corners)]
    for r in range(rings - 1):
        for k in range(corners):
            a, b = 1 + r * corners + k, 1 + r * corners + (k + 1) % corners
            faces += [(a, a + corners, b), (b, a + corners, b + corners)]
    return points, torch.tensor(faces)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shift", [0.05, 0.3, 0.5, 0.8, 0.95])
def test_square_has_its_exact_coverage(backend, shift):
    square = torch.tensor([[10.0, 20], [30, 20], [30, 26], [10, 26]]) + torch.tensor([shift, 0.0])
    leaf = square.clone().requires_grad_()
    image = opacity(leaf, torch.tensor([[0, 1, 2], [0, 2, 3]]), backend)
    row = torch.zeros(SIZE)
    row[11:30] = 1
    row[10], row[30] = 1 - shift, shift
    expected = torch.zeros(SIZE, SIZE)
    expected[20:26] = row
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    image[:, :20].sum().backward()  # area left of the middle: falls by the height of six rows as the left side moves
    torch.testing.assert_close(leaf.grad[:, 0].sum(), torch.tensor(-6.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad[1:3, 0], torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rings", [1, 12])
@pytest.mark.parametrize("centre", [(24.0, 24.0), (23.7, 24.41), (24.5, 24.5), (24.13, 23.79)])
def test_area_of_a_disc_and_its_derivatives(rings, centre):
    """The sum of opacities is the area; its derivatives by scale and shift are those of area and first moment."""
    unit, faces = disc(rings, 40)
    scale = torch.tensor(15.3, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(centre, dtype=torch.float64, requires_grad=True)
    image = opacity(scale * unit + shift, faces)
    area = 0.5 * 40 * math.sin(2 * math.pi / 40) * 15.3**2
    assert abs(float(image.detach().sum()) / area - 1) < 0.004
    by_scale, by_shift = torch.autograd.grad(image.sum(), (scale, shift), retain_graph=True)
    assert abs(float(by_scale) / (2 * area / 15.3) - 1) < 0.03
    assert float(by_shift.abs().max()) < 0.03 * 2 * math.pi * 15.3
    x = torch.arange(SIZE, dtype=torch.float64) + 0.5
    for axis, coordinate in enumerate((x[None, :], x[:, None])):
        moment = (image * coordinate).sum() - image.sum() * shift[axis].detach()  # about the centre
        (gradient,) = torch.autograd.grad(moment, shift, retain_graph=True)
        assert abs(float(gradient[axis]) / area - 1) < 0.04
        assert abs(float(gradient[1 - axis])) < 0.04 * area


def test_fine_rings_are_thinner_than_a_pixel():
    """Otherwise the disc of 12 rings would be no harder a test than the disc of one ring."""
    unit, faces = disc(12, 40)
    found = rasterize(to_clip(15.3 * unit + 24.13), faces, SIZE, SIZE)
    outermost = torch.arange(len(faces) - 80, len(faces)) + 1
    assert torch.isin(outermost.int(), found.triangle).float().mean() < 0.2


def sphere_clip(scale: torch.Tensor, subdivisions: int) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = trimesh.creation.icosphere(subdivisions)
    vertices = torch.tensor(mesh.vertices, dtype=scale.dtype) * scale
    camera = orbit(*(torch.tensor([x]) for x in (33.0, 17.0, 3.0, 50.0)), SIZE, SIZE)
    matrix = (camera.projection() @ camera.w2c)[0].to(scale.dtype)
    return (torch.nn.functional.pad(vertices, (0, 1), value=1.0) @ matrix.T)[None], torch.tensor(mesh.faces)


@pytest.mark.parametrize("subdivisions", [2, 4])
def test_silhouette_of_a_sphere_in_perspective(subdivisions):
    """The sphere projects to a disc of radius f r / sqrt(d^2 - r^2), for any resolution of the mesh."""
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    clip, faces = sphere_clip(scale, subdivisions)
    image = opacity(torch.empty(0), faces, clip=clip)
    (gradient,) = torch.autograd.grad(image.sum(), scale)
    focal = 0.5 * SIZE / math.tan(math.radians(25))
    area = math.pi * focal**2 / (9 - 1)
    slope = math.pi * focal**2 * 2 * 9 / (9 - 1) ** 2
    coarse = 0.03 if subdivisions == 2 else 0.01  # the polyhedron lies within the sphere
    assert abs(float(image.detach().sum()) / area - 1) < coarse
    assert abs(float(gradient) / slope - 1) < 0.04


def test_only_silhouettes_are_blended():
    """Colors inside a smooth surface do not change, also with random winding."""
    clip, faces = sphere_clip(torch.tensor(1.0), 3)
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(int(faces.max()) + 1, 3, generator=generator)
    found = rasterize(clip, faces, SIZE, SIZE)
    image = interpolate(colours, found, faces)
    smooth = antialias(image, found, clip, faces)
    changed = (smooth != image).any(dim=-1)[0]
    border = torch.nn.functional.max_pool2d(1 - found.mask.float(), 3, 1, 1)[0] > 0
    border &= torch.nn.functional.max_pool2d(found.mask.float(), 3, 1, 1)[0] > 0
    assert changed.any() and not (changed & ~border).any()
    mixed = faces.clone()
    flip = torch.rand(len(faces), generator=generator) < 0.5
    mixed[flip] = mixed[flip].flip(1)
    torch.testing.assert_close(antialias(image, found, clip, mixed), smooth)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_occluder_blends_into_what_lies_behind(backend):
    """Near square over a far one that fills the image: only edges of the near square blend and get gradients."""
    points = torch.tensor([[0.0, 0, 0.5], [48, 0, 0.5], [48, 48, 0.5], [0, 48, 0.5]])
    points = torch.cat((points, torch.tensor([[10.3, 10, 0.1], [20.3, 10, 0.1], [20.3, 20, 0.1], [10.3, 20, 0.1]])))
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    colours = torch.tensor([0.2] * 4 + [1.0] * 4)[:, None]
    points.requires_grad_()
    clip = to_clip(points)
    found = rasterize(clip, faces, SIZE, SIZE, backend=backend)
    image = antialias(interpolate(colours, found, faces), found, clip, faces, backend=backend)[0, ..., 0]
    row = torch.full((SIZE,), 0.2)
    row[11:20] = 1.0
    row[10], row[20] = 0.2 + 0.8 * 0.7, 0.2 + 0.8 * 0.3
    torch.testing.assert_close(image[15], row, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(image[:, 15:].sum(), points)
    torch.testing.assert_close(gradient[4:, 0].sum(), torch.tensor(0.8 * 10), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient[:4, 0], torch.zeros(4), rtol=0, atol=1e-5)


@needs_native
@pytest.mark.parametrize("seed", range(3))
def test_native_equals_torch(seed):
    generator = torch.Generator().manual_seed(seed)
    mesh = trimesh.creation.torus(1.0, 0.4, major_sections=40, minor_sections=24)
    vertices = torch.tensor(mesh.vertices, dtype=torch.float32)
    vertices = vertices + 0.05 * torch.randn(vertices.shape, generator=generator)  # folds and self-intersections
    faces = torch.tensor(mesh.faces)[torch.randperm(len(mesh.faces), generator=generator)[: len(mesh.faces) - 200]]
    angles = (torch.rand(3, generator=generator) * 360, torch.rand(3, generator=generator) * 120 - 60)
    distance = torch.tensor([3.0, 1.0, 0.5])  # from outside, within and through the eye's plane
    camera = orbit(*angles, distance, torch.full((3,), 60.0), 50, 70)
    clip = torch.nn.functional.pad(vertices, (0, 1), value=1.0) @ (camera.projection() @ camera.w2c).transpose(1, 2)
    upstream = torch.randn(3, 50, 70, 4, generator=generator)
    colours = torch.randn(len(vertices), 4, generator=generator)
    results = []
    for backend in ("native", "torch"):
        leaf, values = clip.clone().requires_grad_(), colours.clone().requires_grad_()
        found = rasterize(leaf, faces, 50, 70, backend=backend)
        image = interpolate(values, found, faces).detach().requires_grad_()
        out = antialias(image, found, leaf, faces, backend=backend)
        results.append((out, *torch.autograd.grad((out * upstream).sum(), (image, leaf))))
    blended = int((results[0][0] != image).any(dim=-1).sum())
    assert blended > 500
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5 * float(reference.detach().abs().max()))


def test_gradients_against_finite_differences():
    generator = torch.Generator().manual_seed(4)
    points = torch.rand(9, 2, generator=generator, dtype=torch.float64) * SIZE * 0.9 + 2
    depth = torch.rand(9, 1, generator=generator, dtype=torch.float64) - 0.5
    w = 0.5 + torch.rand(1, 9, 1, generator=generator, dtype=torch.float64)
    faces = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [2, 1, 3]])
    clip = (to_clip(torch.cat((points, depth), dim=1)) * w).requires_grad_()
    image = torch.rand(1, SIZE, SIZE, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(1, SIZE, SIZE, 2, generator=generator, dtype=torch.float64)

    def blended(image, clip):
        return (antialias(image, rasterize(clip, faces, SIZE, SIZE), clip, faces) * upstream).sum()

    by_image, by_clip = torch.autograd.grad(blended(image, clip), (image, clip))
    for tensor, gradient in ((image, by_image), (clip, by_clip)):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        step = 1e-7
        arguments = [[image, clip], [image, clip]]
        for sign, values in zip((1, -1), arguments, strict=True):
            values[0 if tensor is image else 1] = tensor.detach() + sign * step * direction
        change = blended(*arguments[0]) - blended(*arguments[1])
        difference = float(change.detach()) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-5)
    assert int((by_clip[..., :2] != 0).sum()) == 18


def test_edges_of_a_mesh():
    """Half-edge 3 f + e is opposite to corner e; two triangles share 1-2; an edge of three triangles is open."""
    assert mesh_edges(torch.tensor([[0, 1, 2], [2, 1, 3]])).across.tolist() == [[5, -1, -1], [-1, -1, 0]]
    assert mesh_edges(torch.tensor([[0, 1, 2], [1, 2, 3]])).across.tolist() == [[5, -1, -1], [-1, -1, 0]]
    three = mesh_edges(torch.tensor([[0, 1, 2], [1, 2, 3], [4, 1, 2]]))
    assert (three.across == -1).all()
    mesh = trimesh.creation.icosphere(2)
    faces = torch.tensor(mesh.faces)
    across = mesh_edges(faces).across.reshape(-1).long()
    assert (across >= 0).all() and torch.equal(across[across], torch.arange(len(across)))
    assert mesh_edges(torch.empty(0, 3, dtype=torch.int64)).across.shape == (0, 3)


def test_errors():
    clip = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    faces = torch.tensor([[0, 1, 2]])
    found = rasterize(clip, faces, 4, 4)
    with pytest.raises(ValueError, match=r"the image must be \(B, H, W, C\) with \(B, H, W\) = \(1, 4, 4\)"):
        antialias(torch.zeros(1, 5, 4, 1), found, clip, faces)
    with pytest.raises(ValueError, match="topology belongs to 2 faces, but the mesh has 1"):
        antialias(torch.zeros(1, 4, 4, 1), found, clip, faces, topology=mesh_edges(faces.expand(2, 3)))
