"""The Gaussian renderer against hand-computed Gaussians and finite differences, and in a fit with densification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.gaussians.model import Gaussians
from scoredist3d.materials import Material, ShadingInputs
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.rotations import quaternions_to, rotation_matrices
from scoredist3d.renderers.gaussian_splatting import GaussianSplatting
from scoredist3d.seeding import Rng
from scoredist3d.training.optimizer import build_optimizer


def build(kind: str, name: str, **options: Any) -> Any:
    return registry.build(parse_component(kind, {"type": name, **options}))


def renderer(geometry: Gaussians, *, material: Any = None, background: Any = None, **options: Any) -> GaussianSplatting:
    return registry.build(
        parse_component("renderer", {"type": "gaussian-splatting", **options}),
        geometry=geometry,
        material=material or build("material", "unlit"),
        background=background or build("background", "solid"),
    )


def cloud(
    means: list[list[float]],
    *,
    scales: float | list[list[float]] = 0.1,
    opacities: float | list[float] = 0.9,
    quaternions: Tensor | None = None,
    material: Any = None,
    **options: Any,
) -> Gaussians:
    """Gaussians at given positions with different colors."""
    config = parse_component("geometry", {"type": "gaussians", "num_points": 4, **options})
    geometry: Gaussians = registry.build(config, rng=Rng(), material=material)
    count = len(means)
    state = {
        "means": torch.tensor(means),
        "log_scales": torch.as_tensor(scales).log().expand(count, 3).clone(),
        "quaternions": torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1) if quaternions is None else quaternions,
        "opacity_logits": torch.logit(torch.as_tensor(opacities)).expand(count).clone(),
        "features": torch.linspace(-1, 1, count * geometry.num_features).view(count, -1),
        "gradient_sum": torch.zeros(count),
        "views_seen": torch.zeros(count),
    }
    geometry.load_state_dict(state)
    return geometry


def scattered(count: int = 30, material: Any = None, **options: Any) -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    made = cloud(
        (0.4 * torch.randn(count, 3, generator=generator)).clamp(-0.5, 0.5).tolist(),
        scales=(0.03 + 0.1 * torch.rand(count, 3, generator=generator)).tolist(),
        opacities=(0.2 + 0.7 * torch.rand(count, generator=generator)).tolist(),
        quaternions=torch.randn(count, 4, generator=generator),
        material=material,
        **options,
    )
    return made


def views(
    *azimuths: float, size: int = 17, fovy: float = 40.0, elevation: float = 0.0, width: int | None = None
) -> Cameras:
    azimuth = torch.tensor(azimuths)
    ones = torch.ones_like(azimuth)
    return orbit(azimuth, elevation * ones, 3.0 * ones, fovy * ones, size, width or size)


def test_one_gaussian_by_hand():
    """The center pixel has the color of the Gaussian over the background, and its distance as depth."""
    geometry = cloud([[0.2, 0.0, 0.0]], opacities=0.8)
    render = renderer(geometry)(views(0.0, 180.0), step=0)
    color = geometry.features.sigmoid()[0]
    background = render.background[0, 8, 8]
    for view, distance in ((0, 2.8), (1, 3.2)):
        torch.testing.assert_close(render.opacity[view, 8, 8], torch.tensor([0.8]))
        torch.testing.assert_close(render.rgb[view, 8, 8], 0.8 * color + 0.2 * background)
        torch.testing.assert_close(render.depth[view, 8, 8], torch.tensor([distance]))
    assert render.opacity[0, 0, 0] == 0 and render.depth[0, 0, 0] == 0
    assert torch.equal(render.rgb[0, 0, 0], background)
    assert render.normal is None and render.mesh is None


def test_depth_is_along_the_ray():
    """For a Gaussian off the axis, the depth is the distance along the ray, not along the viewing axis."""
    cameras = views(0.0, size=32, width=64, fovy=60.0)
    rays = cameras.rays()
    point = rays.origins[0, 4, 60] + 2.5 * rays.directions[0, 4, 60]
    assert rays.cosines[0, 4, 60] < 0.85
    render = renderer(cloud([point.tolist()], scales=0.05, radius=4.0))(cameras, step=0)
    torch.testing.assert_close(render.depth[0, 4, 60], torch.tensor([2.5]))
    assert render.opacity[0].argmax() == 4 * 64 + 60


def test_positions_and_depth_variance_by_hand():
    geometry = cloud([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]], opacities=[0.6, 0.7])
    render = renderer(geometry)(views(0.0), step=0, needs={"position", "depth_variance"})
    shares = torch.tensor([0.6, 0.28]) / 0.88
    mean = (shares * torch.tensor([2.5, 3.5])).sum()
    variance = (shares * (torch.tensor([2.5, 3.5]) - mean).square()).sum()
    torch.testing.assert_close(render.depth_variance[0, 8, 8, 0], variance)
    torch.testing.assert_close(render.position[0, 8, 8], torch.tensor([3.0 - mean, 0.0, 0.0]), atol=1e-6, rtol=0)
    assert not render.position.requires_grad
    with pytest.raises(ValueError, match="GaussianSplatting does not provide the maps distortion"):
        renderer(geometry)(views(0.0), step=0, needs={"distortion"})


def test_the_nearer_one_hides_the_other():
    geometry = cloud([[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0]], opacities=[0.6, 0.7])
    render = renderer(geometry)(views(0.0), step=0)
    front, back = geometry.features.sigmoid()
    seen = render.rgb[0, 8, 8] - (1 - render.opacity[0, 8, 8]) * render.background[0, 8, 8]
    torch.testing.assert_close(seen, 0.6 * front + 0.4 * 0.7 * back)
    torch.testing.assert_close(render.depth[0, 8, 8], torch.tensor([(0.6 * 2.5 + 0.28 * 3.5) / 0.88]))


def test_normals_are_shortest_axes_that_face_the_camera():
    normal = torch.nn.functional.normalize(torch.tensor([[1.0, 0.5, 0.3]]), dim=-1)
    geometry = cloud([[0.0, 0.0, 0.0]], scales=[[0.2, 0.2, 0.01]], quaternions=quaternions_to(normal))
    render = renderer(geometry)(views(0.0, 180.0), step=0, needs={"normal"})
    torch.testing.assert_close(render.normal[0, 8, 8], normal[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(render.normal[1, 8, 8], -normal[0], atol=1e-5, rtol=0)
    assert (render.normal[0, 0, 0] == 0).all()
    plain = renderer(geometry)(views(0.0, 180.0), step=0)
    torch.testing.assert_close(plain.rgb, render.rgb)
    torch.testing.assert_close(plain.depth, render.depth)


def test_lit_gaussians_by_hand():
    """A headlight on a disk rotated by 60 degrees: ambient + diffuse cos 60."""
    material = build("material", "diffuse", evaluation="diffuse")
    normal = torch.tensor([[0.5, math.sqrt(0.75), 0.0]])
    geometry = cloud([[0.0] * 3], scales=[[0.2, 0.2, 0.01]], quaternions=quaternions_to(normal), material=material)
    render = renderer(geometry, material=material)(views(0.0), step=0)
    seen = render.rgb[0, 8, 8] - (1 - render.opacity[0, 8, 8]) * render.background[0, 8, 8]
    torch.testing.assert_close(seen, 0.9 * (0.1 + 0.9 * 0.5) * geometry.features.sigmoid()[0], atol=1e-5, rtol=1e-5)


def test_each_camera_sees_its_own_colour():
    material = build("material", "spherical-harmonics", degree=2, degree_every=0)
    geometry = cloud([[0.0, 0.0, 0.0]], material=material)
    render = renderer(geometry, material=material)(views(0.0, 90.0), step=0)
    for view, direction in ((0, [-1.0, 0, 0]), (1, [0, -1.0, 0])):
        color = material(ShadingInputs(geometry.features, view_dirs=torch.tensor([direction])))[0]
        seen = render.rgb[view, 8, 8] - (1 - render.opacity[view, 8, 8]) * render.background[view, 8, 8]
        torch.testing.assert_close(seen, 0.9 * color, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["unlit", "diffuse", "spherical-harmonics"])
def test_a_batch_is_its_cameras_one_by_one(name):
    material = build("material", name, **({"evaluation": "diffuse"} if name == "diffuse" else {}))
    material.update_step(5000)
    shown = renderer(scattered(material=material), material=material)
    cameras = views(10.0, 130.0, 250.0, elevation=20.0)
    together = shown(cameras, step=5000, needs={"normal"})
    for index in range(3):
        alone = shown(cameras[index], step=5000, needs={"normal"})
        for field in ("rgb", "opacity", "depth", "normal"):
            # Depths and normals are divided by the opacity, which amplifies rounding where it is small.
            torch.testing.assert_close(getattr(together, field)[index], getattr(alone, field)[0], atol=1e-4, rtol=1e-5)


def test_evaluation_needs_no_gradients_and_no_randomness():
    geometry = scattered(densify={"start": 0})
    shown = renderer(geometry, background=build("background", "random"))
    cameras = views(0.0, 60.0)
    with torch.no_grad():
        first = shown(cameras, step=0, needs={"normal"})
    second = shown(cameras, step=0, needs={"normal"})
    assert not first.rgb.requires_grad and second.rgb.requires_grad
    for field in ("rgb", "opacity", "depth", "normal", "background"):
        torch.testing.assert_close(getattr(first, field), getattr(second, field))
    assert not first.projection.means2d.requires_grad


def test_training_draws_as_the_volume_renderer_does():
    """All renderers draw the same backgrounds and lights in a step."""
    background, cameras = build("background", "random"), views(0.0, 60.0, size=8)
    geometry = build("geometry", "implicit-volume", grid={"num_levels": 2, "log2_hashmap_size": 6})
    other = registry.build(
        parse_component("renderer", {"type": "volume", "num_samples": 8}),
        geometry=geometry,
        material=build("material", "unlit"),
        background=background,
    )
    shown = renderer(scattered(), background=background)
    state = torch.random.get_rng_state()
    one, two = (each(cameras, step=3, rng=Rng(7)).background for each in (shown, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, shown(cameras, step=4, rng=Rng(7)).background)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_small_gaussians_are_dimmed_where_asked():
    """A Gaussian far smaller than a pixel has a small opacity with antialiasing, but its full opacity without."""
    geometry, cameras = cloud([[0.0, 0.0, 0.0]], scales=0.03), views(0.0)
    bright = renderer(geometry)(cameras, step=0).opacity[0, 8, 8]
    dim = renderer(geometry, antialiased=True)(cameras, step=0).opacity[0, 8, 8]
    variance = (0.03 / 3 * 0.5 * 17 / math.tan(math.radians(20))) ** 2
    torch.testing.assert_close(bright, torch.tensor([0.9]))
    torch.testing.assert_close(dim, torch.tensor([0.9 * variance / (variance + 0.3)]), rtol=1e-3, atol=1e-5)


def test_autocast_changes_nothing():
    shown, cameras = renderer(scattered()), views(0.0, 60.0)
    plain = shown(cameras, step=0, needs={"normal"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = shown(cameras, step=0, needs={"normal"})
    assert mixed.rgb.dtype == torch.float32
    torch.testing.assert_close(mixed.rgb, plain.rgb)
    torch.testing.assert_close(mixed.depth, plain.depth)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_backends_show_the_same(backend):
    geometry, cameras = scattered(), views(0.0, 60.0)
    reference, other = (
        renderer(geometry, backend=name)(cameras, step=0, needs={"normal"}) for name in ("torch", backend)
    )
    torch.testing.assert_close(other.rgb, reference.rgb, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.normal, reference.normal, atol=1e-4, rtol=1e-3)


def test_gradients_match_finite_differences():
    """Directional derivatives of a random functional of all outputs by each parameter, in float64."""
    material = build("material", "spherical-harmonics", degree=2, degree_every=0)
    geometry = scattered(8, material=material).double()
    with torch.no_grad():
        geometry.features.mul_(0.1)
    shown = renderer(geometry, material=material, backend="torch", antialiased=True)
    cameras = views(0.0, 60.0, size=9)
    cameras = Cameras(
        *(getattr(cameras, name).double() for name in ("c2w", "fovy", "azimuth", "elevation", "distance")), 9, 9
    )
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(2, 9, 9, 8, generator=generator, dtype=torch.float64)

    def functional() -> Tensor:
        render = shown(cameras, step=0, needs={"normal"})
        # Depth and normal are undefined at opacity 0, so weight them by the opacity.
        values = [render.rgb, render.opacity, render.depth * render.opacity, render.normal * render.opacity]
        return (torch.cat(values, dim=-1) * mix).sum()

    parameters = [geometry.means, geometry.log_scales, geometry.quaternions, geometry.opacity_logits, geometry.features]
    gradients = torch.autograd.grad(functional(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                parameter.add_(sign * 1e-7 * direction)
                found.append(functional().item())
                parameter.sub_(sign * 1e-7 * direction)
        expected = (found[0] - found[1]) / 2e-7
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


class FourGrays(Background):
    """A background of constant latents."""

    def forward(self, directions: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.full_like(directions[..., :1], 0.3).expand(*directions.shape[:-1], 4)


class FourChannels(Material):
    """A material whose latents are the features."""

    num_features = num_channels = 4
    outputs_latents = True

    def forward(self, inputs: ShadingInputs) -> Tensor:
        return inputs.features

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        return SurfaceChannels(inputs.features[:, :3])

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        return torch.nn.functional.pad(channels.base_color, (0, 1))


def test_latents_of_any_channels():
    material = FourChannels(Material.Config())
    geometry = cloud([[0.0, 0.0, 0.0]], material=material)
    background = FourGrays(Background.Config())
    render = renderer(geometry, material=material, background=background)(views(0.0), step=0, needs={"normal"})
    assert render.rgb.shape == (1, 17, 17, 4)
    torch.testing.assert_close(
        render.rgb[0, 8, 8], 0.9 * geometry.features[0] + 0.1 * render.background[0, 8, 8], atol=1e-5, rtol=1e-5
    )


def test_other_geometries_are_refused():
    with pytest.raises(ValueError, match=r"^type: GaussianSplatting cannot render ImplicitVolume"):
        renderer(build("geometry", "implicit-volume"))


def sphere_views(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """(B, H, W, 3) images over black, and masks, of a sphere of radius 0.6 with the color 0.5 + 0.4 n."""
    rays = cameras.rays()
    along = (rays.origins * rays.directions).sum(-1)
    root = along.square() - rays.origins.square().sum(-1) + 0.6**2
    hit = (root > 0)[..., None]
    points = rays.origins + (-along - root.clamp_min(0).sqrt())[..., None] * rays.directions
    return torch.where(hit, 0.5 + 0.4 * points / 0.6, 0.0), hit


def test_gaussians_fit_a_coloured_sphere():
    """300 Gaussians with densification fit 6 views; a further view is compared."""
    densify = {"start": 30, "every": 30, "end": 120, "grad_threshold": 5e-5, "size_threshold": 0.06, "max_points": 600}
    densify |= {"opacity_reset_every": 0, "prune_opacity": 0.02}
    material, background = build("material", "unlit"), build("background", "solid", color=[0.0, 0.0, 0.0])
    geometry = registry.build(
        parse_component("geometry", {"type": "gaussians", "num_points": 300, "init_radius": 0.7, "densify": densify}),
        rng=Rng(),
        material=material,
    )
    shown = renderer(geometry, material=material, background=background)
    cameras = views(0.0, 60.0, 120.0, 180.0, 240.0, 300.0, size=32, elevation=20.0)
    images, _ = sphere_views(cameras)
    rates = {"means": 0.005, "scales": 0.02, "quaternions": 0.02, "opacities": 0.1, "features": 0.1}
    config = OptimizerConfig(lr=0.01, lr_groups=rates, eps=1e-15)
    optimizer = build_optimizer(config, geometry.parameter_groups())
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]
    for step in range(180):
        index = torch.tensor([step % 6, (step + 3) % 6])
        optimizer.zero_grad()
        render = shown(cameras[index], step=step, rng=Rng())
        geometry.densification.step_pre_backward(render.projection)
        (render.rgb - images[index]).abs().mean().backward()
        optimizer.step()
        geometry.densification.step_post_backward(step, optimizer, Rng())
    unseen = views(30.0, size=32, elevation=0.0)
    with torch.no_grad():
        render = shown(unseen, step=180)
    image, hit = sphere_views(unseen)
    psnr = -10 * math.log10((render.rgb - image).square().mean())
    assert 300 < len(geometry) <= 600
    assert psnr > 24
    rays = unseen.rays()
    along = (rays.origins * rays.directions).sum(-1)
    depth = -along - (along.square() - 9.0 + 0.36).clamp_min(0).sqrt()
    inner = hit[..., 0] & (render.opacity[..., 0] > 0.9)
    assert (render.depth[..., 0] - depth)[inner].abs().mean() < 0.1
    assert rotation_matrices(geometry.quaternions).isfinite().all()
