"""Rasterized meshes against the geometry of a pinhole camera."""

import math

import numpy as np
import pytest
import torch
from shared.surface_scenes import FixedMesh, around, build, cube, icosphere, renderer_of, views
from torch import Tensor

from scoredist3d.geometry.base import GeometryInit
from scoredist3d.materials.base import Material
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.renderers import Render
from scoredist3d.seeding import Rng

HALF = 0.5
NOTHING = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))


class Seen(Material):
    """A material that records its inputs and returns the features."""

    needs_normal = True
    needs_view_dirs = True

    def __init__(self, num_channels: int = 3) -> None:
        super().__init__(Material.Config())
        self.num_features = self.num_channels = num_channels
        self.outputs_latents = num_channels != 3

    def forward(self, inputs):
        self.normals, self.view_dirs, self.points = inputs.normals, inputs.view_dirs, inputs.points
        return inputs.features

    def channels(self, inputs):
        return SurfaceChannels(inputs.features)


def rgb_of_sides(points) -> Tensor:
    """Red, green and blue features for cube faces along x, y and z."""
    side = points.points.abs().argmax(dim=-1)
    return 20.0 * torch.eye(3)[side] - 10.0


def test_pixels_of_a_cube():
    """From +x, the half width of the front face is (0.5 / 2.5) / tan(20 degrees) of half the image width."""
    render: Render = renderer_of(FixedMesh(cube(HALF), rgb_of_sides))(views(0.0, size=64), step=0)
    assert render.rgb[0, 32, 32].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-3)
    assert render.rgb[0, 2, 2].tolist() == [0.0, 0.0, 0.0]
    width = HALF / 2.5 / math.tan(math.radians(20.0)) * 64
    assert render.opacity.sum().item() == pytest.approx(width**2, rel=0.005)
    assert render.depth[0, 32, 32].item() == pytest.approx(2.5, abs=2e-3)
    assert render.depth[0, 2, 2].item() == 0.0
    assert render.opacity.min() >= 0 and render.opacity.max() <= 1


@pytest.mark.parametrize("azimuth", [0.0, 90.0])
def test_depth_is_measured_along_the_ray(azimuth):
    cameras = views(azimuth, size=32)
    render = renderer_of(FixedMesh(cube(HALF)))(cameras, step=0, needs={"position", "normal"})
    inside = render.opacity[..., 0] == 1
    cosines = cameras.rays().cosines
    torch.testing.assert_close((render.depth[..., 0] * cosines)[inside], torch.full_like(cosines[inside], 2.5))
    axis = 0 if azimuth == 0.0 else 1
    assert render.position is not None and not render.position.requires_grad
    torch.testing.assert_close(render.position[inside][:, axis], torch.full_like(cosines[inside], HALF))


def test_up_and_left_are_where_they_should_be():
    """From +x, world +y is right and +z is up."""
    small = cube(0.1)
    right = Mesh(small.vertices + np.array([0, 0.4, 0], np.float32), small.faces)
    high = Mesh(small.vertices + np.array([0, 0, 0.4], np.float32), small.faces)
    for mesh, row, column in ((right, 0.5, 0.68), (high, 0.32, 0.5)):
        opacity = renderer_of(FixedMesh(mesh))(views(0.0), step=0).opacity[0, ..., 0]
        rows, columns = torch.nonzero(opacity > 0.5).float().mean(dim=0) / 64
        assert float(rows) == pytest.approx(row, abs=0.03)
        assert float(columns) == pytest.approx(column, abs=0.03)


@pytest.mark.parametrize("normals", ["smooth", "flat"])
def test_normals_of_a_sphere(normals):
    render = renderer_of(FixedMesh(icosphere(0.5)), normals=normals)(views(40.0), step=0, needs={"normal", "position"})
    inside = render.opacity[..., 0] == 1
    expected = torch.nn.functional.normalize(render.position[inside], dim=-1)
    cosine = (render.normal[inside] * expected).sum(-1)
    assert cosine.min() > (0.999 if normals == "smooth" else 0.98)
    torch.testing.assert_close(render.normal[inside].norm(dim=-1), torch.ones_like(cosine))
    assert render.normal[render.opacity[..., 0] == 0].abs().max() == 0


def test_light_shades_by_the_angle():
    """A headlight: albedo 1/2 times (ambient + diffuse cos) at every pixel of the front."""
    material = build("material", "diffuse", evaluation="diffuse", ambient=0.2, diffuse=0.8)
    cameras = views(0.0, 90.0, size=32)
    render = renderer_of(FixedMesh(cube(HALF)), material=material, normals="flat")(cameras, step=0)
    inside = render.opacity[..., 0] == 1
    expected = 0.5 * (0.2 + 0.8 * cameras.rays().cosines[inside])
    torch.testing.assert_close(render.rgb[inside], expected[:, None].expand(-1, 3), atol=1e-4, rtol=0)


def test_what_a_material_is_given():
    material = Seen()
    cameras = views(0.0, 50.0, size=16)
    renderer_of(FixedMesh(icosphere(0.5)), material=material)(cameras, step=0)
    torch.testing.assert_close(material.view_dirs.norm(dim=-1), torch.ones(len(material.points)))
    origins = cameras.origins[(torch.arange(len(material.points)) >= len(material.points) / 2).long()]
    cosine = torch.nn.functional.cosine_similarity(material.points - origins, material.view_dirs)
    assert (cosine > 0.999).float().mean() > 0.95
    assert ((material.normals * material.view_dirs).sum(-1) < 0.15).all()


def test_latents_pass_through():
    geometry = FixedMesh(cube(HALF), lambda p: p.points.new_tensor([5.0, -5.0, 0.5, 2.0]).expand(len(p.points), 4))
    geometry.num_features = 4

    def behind(directions, *, generator=None):
        return directions.new_full((*directions.shape[:-1], 4), -3.0)

    render = renderer_of(geometry, material=Seen(4), background=behind)(views(0.0, size=16), step=0)
    torch.testing.assert_close(render.rgb[0, 8, 8], torch.tensor([5.0, -5.0, 0.5, 2.0]))
    torch.testing.assert_close(render.rgb[0, 0, 0], torch.full((4,), -3.0))


@pytest.mark.parametrize("supersample", [1, 2])
def test_evaluation_in_chunks_is_the_same(supersample):
    renderer = renderer_of(FixedMesh(icosphere(0.5), rgb_of_sides), evaluation_chunk=2, supersample=supersample)
    cameras = around(5, size=24)
    whole = renderer(cameras, step=0, needs={"normal"})
    with torch.no_grad():
        parts = renderer(cameras, step=0, needs={"normal"})
    for name in ("rgb", "opacity", "depth", "normal"):
        torch.testing.assert_close(parts.get(name), whole.get(name).detach())


def test_supersampling_counts_parts_of_pixels():
    """With 2 x 2 samples and no antialiasing, the opacity is a multiple of 1/4."""
    cameras = views(20.0, size=32)
    render = renderer_of(FixedMesh(icosphere(0.5)), supersample=2, antialias=False)(cameras, step=0)
    quarters = render.opacity * 4
    assert torch.equal(quarters, quarters.round()) and (quarters % 4 != 0).sum() > 0
    finest = renderer_of(FixedMesh(icosphere(0.5)))(cameras.with_size(128, 128), step=0).opacity.sum() / 16
    assert render.opacity.sum().item() == pytest.approx(finest.item(), rel=0.01)


def test_silhouettes_pull_on_vertices():
    """The derivative of the covered area with respect to the scale of a cube, against finite differences."""
    geometry = FixedMesh(cube(HALF))
    renderer = renderer_of(geometry)
    cameras = views(0.0, 33.0, elevation=20.0, size=96)

    def area(scale: Tensor) -> Tensor:
        geometry.vertices.data = torch.from_numpy(cube(HALF).vertices) * scale.detach()
        return renderer(cameras, step=0).opacity.sum()

    area(torch.tensor(1.0)).backward()
    slope = (geometry.vertices.grad * geometry.vertices).sum().item()
    with torch.no_grad():
        finite = float(area(torch.tensor(1.02)) - area(torch.tensor(0.98))) / 0.04
    assert slope == pytest.approx(finite, rel=0.03)


def test_no_gradient_of_silhouettes_without_antialiasing():
    geometry = FixedMesh(cube(HALF))
    renderer_of(geometry, antialias=False)(views(10.0), step=0).opacity.sum().backward()
    assert geometry.vertices.grad is None or geometry.vertices.grad.abs().max() == 0


def test_a_mesh_without_faces_is_background():
    geometry = FixedMesh(NOTHING)
    background = build("background", "solid", color=[0.2, 0.4, 0.6])
    render = renderer_of(geometry, background=background)(views(0.0, 90.0, size=8), step=0, needs={"normal"})
    torch.testing.assert_close(render.rgb, torch.tensor([0.2, 0.4, 0.6]).expand(2, 8, 8, 3))
    assert render.opacity.abs().max() == render.depth.abs().max() == 0
    (render.rgb.sum() + render.opacity.sum()).backward()
    assert geometry.vertices.grad is not None


def test_training_draws_backgrounds_and_lights_from_the_step():
    material = build("material", "diffuse", ambient_only_steps=0, diffuse_probability=1.0)
    renderer = renderer_of(FixedMesh(icosphere(0.5)), material=material, background=build("background", "random"))
    cameras = views(0.0, 90.0, size=12)
    first, again, other = (renderer(cameras, step=step, rng=Rng(3)).rgb for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_mesh_is_handed_to_losses():
    geometry = FixedMesh(cube(HALF))
    mesh = renderer_of(geometry)(views(0.0, size=8), step=0).mesh
    assert mesh is not None and mesh.faces is geometry.faces and mesh.vertices is geometry.vertices


@pytest.mark.parametrize("radius", [0.01, 50.0])
def test_any_scale_of_the_scene(radius):
    """The near and far planes depend on the distance and radius of the ball."""
    small = cube(HALF * radius)
    render = renderer_of(FixedMesh(small, radius=radius))(views(0.0, size=32, distance=3.0 * radius), step=0)
    width = HALF / 2.5 / math.tan(math.radians(20.0)) * 32
    assert render.opacity.sum().item() == pytest.approx(width**2, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dmtet", "flexicubes", "textured-mesh"])
def test_the_device_renders_what_the_processor_renders(kind):
    """Images and gradients of all parameters, through geometry, rasterizer and antialiasing."""
    found = []
    for device in ("cpu", "cuda"):
        options = {"texture_size": 64, "deformable": True} if kind == "textured-mesh" else {"resolution": 16}
        geometry = build("geometry", kind, {"rng": Rng(1)}, **options)
        geometry.init_from(GeometryInit(cube(0.43)), Rng())
        with torch.no_grad():
            for index, parameter in enumerate(geometry.parameters()):
                noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter += 0.01 * noise
        geometry.to(device)
        background = build("background", "solid", color=[0.1, 0.2, 0.3]).to(device)
        render = renderer_of(geometry, background=background)(around(3, size=32).to(device), step=0, needs={"normal"})
        weights = torch.rand(render.rgb.shape, generator=torch.Generator().manual_seed(9)).to(device)
        (weights * (render.rgb + render.opacity + render.depth + render.normal)).sum().backward()
        images = [render.get(name).detach().cpu() for name in ("rgb", "opacity", "depth", "normal")]
        found.append((images, [p.grad.cpu() for p in geometry.parameters()]))
    for ours, theirs in zip(*(images for images, _ in found), strict=True):
        assert (ours - theirs).abs().gt(1e-3).float().mean() < 1e-3
    for ours, theirs in zip(*(gradients for _, gradients in found), strict=True):
        assert (ours - theirs).norm() < 0.02 * ours.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_moves_no_silhouette(dtype):
    """Autocast does not change the image; half-precision clip positions would be off by pixels."""
    renderer = renderer_of(FixedMesh(cube(HALF)))
    exact = renderer(around(2, size=96), step=0)
    with torch.autocast("cpu", dtype):
        mixed = renderer(around(2, size=96), step=0)
    assert torch.equal(mixed.opacity, exact.opacity) and torch.equal(mixed.depth, exact.depth)
