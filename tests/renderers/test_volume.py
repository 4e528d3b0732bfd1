"""The volume renderer against analytic integrals, finite differences and other settings of its own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry import Field, GeometryOutput
from scoredist3d.renderers import Render
from scoredist3d.renderers.volume import VolumeRenderer
from scoredist3d.seeding import Rng

DENSE = {"occupancy": {"enabled": False}, "min_transmittance": 0.0}


class Ball(Field):
    """A ball of constant density; density and features for x < 0 can differ."""

    def __init__(self, front: float, back: float | None = None, radius: float = 1.0) -> None:
        super().__init__(Field.Config(radius=radius))
        self.num_features = 3
        self.front = nn.Parameter(torch.tensor(front))
        self.back = self.front if back is None else nn.Parameter(torch.tensor(back))

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        ahead = points[:, :1] > 0
        features = torch.where(ahead, points.new_tensor([20.0, -20.0, 0.0]), points.new_tensor([-20.0, 20.0, 0.0]))
        normal = nn.functional.normalize(points, dim=-1) if with_normal else None
        return GeometryOutput(self.density(points), features, normal)

    def density(self, points: Tensor) -> Tensor:
        return torch.where(points[:, 0] > 0, self.front, self.back)


def build(kind: str, name: str, **options: Any) -> Any:
    return registry.build(parse_component(kind, {"type": name, **options}))


def renderer(geometry: Field, *, material: Any = None, background: Any = None, **options: Any) -> VolumeRenderer:
    return registry.build(
        parse_component("renderer", {"type": "volume", **options}),
        geometry=geometry,
        material=material or build("material", "unlit"),
        background=background or build("background", "solid"),
    )


def volume(scale: float = 0.3, **options: Any) -> Field:
    """A hash-grid volume with a rough surface."""
    grid = {"num_levels": 3, "log2_hashmap_size": 10, "base_resolution": 4, **options.pop("grid", {})}
    geometry = build("geometry", "implicit-volume", grid=grid, **options)
    with torch.no_grad():
        geometry.table.uniform_(-scale, scale, generator=torch.Generator().manual_seed(0))
    return geometry


def views(*azimuths: float, size: int = 16, fovy: float = 40.0, elevation: float = 0.0) -> Cameras:
    azimuth = torch.tensor(azimuths)
    ones = torch.ones_like(azimuth)
    return orbit(azimuth, elevation * ones, 3.0 * ones, fovy * ones, size, size)


def centre(images: Tensor) -> Tensor:
    """The center pixel of images with odd sizes."""
    return images[:, images.shape[1] // 2, images.shape[2] // 2]


@pytest.mark.parametrize("radius", [1.0, 0.5])
@pytest.mark.parametrize("sigma", [0.3, 2.0, 50.0])
def test_constant_ball(sigma, radius):
    """Center ray: O = 1 - exp(-2 sigma r), mean depth t_near + 1 / sigma - 2 r exp(-2 sigma r) / O."""
    num_samples, length = 200, 2 * radius
    render = renderer(Ball(sigma, radius=radius), num_samples=num_samples, **DENSE)(views(30.0, size=1), step=0)
    opacity = 1 - math.exp(-sigma * length)
    depth = 3.0 - radius + 1 / sigma - length * math.exp(-sigma * length) / opacity
    # A step of 0.005 or more is exact to 2e-7 (float32 at distance 3), so optical depth to 5e-5; tau e^-tau < 0.37.
    assert render.opacity.item() == pytest.approx(opacity, abs=2e-5)
    # Light is absorbed at the midpoint of a step, an error of sigma * step^2 / 12.
    assert render.depth.item() == pytest.approx(depth, abs=sigma * (length / num_samples) ** 2 / 12 + 5e-5)
    assert (render.rgb[..., 2]).item() == pytest.approx(0.5 * opacity + (1 - opacity), abs=1e-5)


def test_chords_of_a_ball():
    """O = 1 - exp(-sigma c) with the chord c = 2 sqrt(1 - b^2) of a ray at distance b from the center."""
    cameras, sigma, num_samples = views(10.0, 200.0, size=9, elevation=20.0), 0.7, 1000
    render = renderer(Ball(sigma), num_samples=num_samples, **DENSE)(cameras, step=0)
    rays = cameras.rays()
    squared = torch.linalg.cross(rays.origins, rays.directions).square().sum(-1)
    chord = 2 * (1 - squared).clamp_min(0).sqrt()
    assert ((chord > 0).float().mean() - 0.7).abs() < 0.2  # some rays hit and some miss the ball
    # A chord is rounded to whole steps, an error of at most half a step of 0.002.
    torch.testing.assert_close(render.opacity[..., 0], 1 - torch.exp(-sigma * chord), atol=sigma * 0.001 + 1e-5, rtol=0)
    assert (render.opacity[chord == 0] == 0).all() and (render.depth[chord == 0] == 0).all()


def test_two_media_hide_each_other_in_order():
    """From the front, red is in front of green: C = (1 - e^-a) red + e^-a (1 - e^-b) green + e^-(a+b) background."""
    a, b = 1.5, 0.4
    background = build("background", "solid", color=[0.0, 0.0, 1.0])
    render = renderer(Ball(a, b), background=background, **DENSE)(views(0.0, 180.0, size=1), step=0)
    red, green = 1 - math.exp(-a), math.exp(-a) * (1 - math.exp(-b))
    behind = math.exp(-a - b)
    expected = torch.tensor([red, green, behind + 0.5 * (1 - behind)])
    torch.testing.assert_close(render.rgb[0, 0, 0], expected, atol=1e-5, rtol=0)
    green_first, red_last = 1 - math.exp(-b), math.exp(-b) * (1 - math.exp(-a))
    expected = torch.tensor([red_last, green_first, behind + 0.5 * (1 - behind)])
    torch.testing.assert_close(render.rgb[1, 0, 0], expected, atol=1e-5, rtol=0)


def test_normals_of_an_opaque_ball_face_the_camera():
    cameras = views(0.0, 90.0, size=9, fovy=30.0)
    render = renderer(Ball(200.0), num_samples=500, **DENSE)(cameras, step=0, needs={"normal"})
    toward = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(centre(render.normal), toward, atol=1e-3, rtol=0)
    # In the front view, normals in the right half lean to +y and normals in the upper half to +z.
    assert render.normal[0, 4, 7, 1] > 0.3 and render.normal[0, 1, 4, 2] > 0.3
    lengths = render.normal.norm(dim=-1)[render.opacity[..., 0] > 0.5]
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_image_gradient_matches_finite_differences():
    """Directional derivative of a random functional of all outputs by every parameter, in float64."""
    geometry = volume(grid={"backend": "torch"}).double()
    draw = renderer(geometry, num_samples=24, **DENSE)
    cameras = views(20.0, 130.0, size=6, elevation=10.0)
    double = {name: getattr(cameras, name).double() for name in ("c2w", "fovy", "azimuth", "elevation", "distance")}
    cameras = Cameras(**double, height=6, width=6)
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 6, 6, 8, generator=generator, dtype=torch.float64)

    def functional() -> Tensor:
        render = draw(cameras, step=3, rng=Rng(1), needs={"normal"})
        return (torch.cat([render.rgb, render.opacity, render.depth, render.normal], dim=-1) * mix).sum()

    for name, parameter in geometry.named_parameters():
        (gradient,) = torch.autograd.grad(functional(), parameter)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(sign * direction)
                values.append(functional().item())
                parameter.sub_(sign * direction)
        expected = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def test_fast_backends_give_the_torch_image_and_gradients():
    """The backend ``auto`` (native code if a C compiler is available) against torch."""
    results = []
    for backend in ("torch", "auto"):
        geometry = volume(grid={"backend": backend})
        render = renderer(geometry, backend=backend)(views(0.0, 100.0), step=0, rng=Rng(), needs={"normal"})
        (render.rgb.sum() + render.depth.sum()).backward()
        results.append((fields_of(render), [parameter.grad for parameter in geometry.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_cuda_gives_the_cpu_image():
    images = []
    for device in ("cpu", "cuda"):
        geometry = volume().to(device)
        draw = renderer(geometry).to(device)
        render = draw(views(0.0, 100.0).to(device), step=0, needs={"normal"})
        images.append({name: value.cpu() for name, value in fields_of(render).items()})
    for name, image in images[1].items():
        # Rounding can move samples across borders of cells, so a few pixels differ by the weight of one sample.
        assert ((image - images[0][name]).abs() > 1e-3).float().mean() < 0.01, name


def test_a_ball_is_learned_from_its_views():
    """A density blob is fitted to two-colored views of a ball over random backgrounds."""
    truth = renderer(Ball(20.0, radius=0.5), num_samples=48, **DENSE)
    geometry = volume(scale=1e-4)
    draw = renderer(geometry, num_samples=48, background=build("background", "random"))
    sampler = build("data", "random-camera", height=16, width=16)
    optimiser = torch.optim.Adam(geometry.parameters(), lr=0.02)
    for step in range(60):
        draw.update_step(step, Rng())
        cameras = sampler.sample(step, Rng())
        render = draw(cameras, step=step, rng=Rng())
        with torch.no_grad():
            target = truth(cameras, step=step)
        wanted = target.rgb + (1 - target.opacity) * (render.background - target.background)
        loss = (render.rgb - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        cameras = views(0.0, 180.0, size=9)
        result, target = draw(cameras, step=0), truth(cameras, step=0)
    assert (result.opacity - target.opacity).abs().mean() < 0.05
    torch.testing.assert_close(centre(result.rgb)[:, :2], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=0.15, rtol=0)


def counted(draw: VolumeRenderer, cameras: Cameras) -> tuple[Render, int]:
    """A render with gradients, and the number of samples with features."""
    seen: list[int] = []
    with draw.geometry.register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0]))):
        return draw(cameras, step=0), sum(seen)


def test_occupancy_does_not_change_the_image():
    geometry = volume(density_blob_strength=30.0)
    cameras = views(0.0, 100.0, elevation=30.0)
    dense = renderer(geometry, **DENSE)
    sparse = renderer(geometry, min_transmittance=0.0)
    for step in range(0, 160, 16):
        sparse.update_step(step, Rng())
    assert sparse.occupancy.occupied.float().mean() < 0.25
    (expected, every), (result, occupied) = (counted(draw, cameras) for draw in (dense, sparse))
    assert occupied < 0.4 * every
    # Skipped cells have an optical depth below 0.01 per step, in at most five steps per ray.
    torch.testing.assert_close(result.rgb, expected.rgb, atol=0.05, rtol=0)
    assert (result.rgb - expected.rgb).abs().mean() < 3e-3


def test_hidden_samples_do_not_change_the_image():
    geometry = volume(density_blob_strength=100.0, density_blob_size=0.9)
    cameras = views(0.0, 100.0)
    every, total = counted(renderer(geometry, **DENSE), cameras)
    reached, kept = counted(renderer(geometry, occupancy={"enabled": False}, min_transmittance=1e-3), cameras)
    assert kept < 0.8 * total
    # Samples with a transmittance below 1e-3 are dropped, and sums are rounded.
    torch.testing.assert_close(reached.rgb, every.rgb, atol=1.02e-3, rtol=0)
    torch.testing.assert_close(reached.opacity, every.opacity, atol=1.02e-3, rtol=0)


def fields_of(render: Render) -> dict[str, Tensor | None]:
    names = ("rgb", "opacity", "depth", "normal", "background")
    return {name: getattr(render, name) for name in names}


@pytest.mark.parametrize("lit", [False, True])
@pytest.mark.parametrize("rng", [None, Rng(4)])
def test_chunks_and_gradients_do_not_change_the_image(lit, rng):
    """Training and evaluation in any chunk size give the same lit image."""
    geometry = volume()
    material = build("material", "diffuse", ambient_only_steps=0, evaluation="diffuse" if lit else "albedo")
    cameras = views(0.0, 100.0, 200.0, size=8, elevation=30.0)
    options = {"material": material, "min_transmittance": 0.0}
    whole, chunked = (renderer(geometry, evaluation_chunk=chunk, **options) for chunk in (1000, 37))
    training = whole(cameras, step=5, rng=rng, needs={"normal"})
    with torch.no_grad():
        for other in (whole, chunked):
            evaluated = other(cameras, step=5, rng=rng, needs={"normal"})
            torch.testing.assert_close(fields_of(evaluated), fields_of(training), atol=2e-5, rtol=1e-4)
        if rng is None:
            alone = whole(cameras[1], step=5, needs={"normal"})
            torch.testing.assert_close(alone.rgb[0], training.rgb[1], atol=2e-5, rtol=0)


def test_training_is_random_by_step_and_evaluation_is_not():
    geometry = volume()
    draw = renderer(geometry, background=build("background", "random", white_probability=0.0))
    cameras = views(0.0, 90.0)
    state = torch.random.get_rng_state()
    first, again, later = (draw(cameras, step=step, rng=Rng(1)) for step in (1, 1, 2))
    assert torch.equal(first.rgb, again.rgb) and not torch.equal(first.background, later.background)
    assert not torch.equal(first.opacity, later.opacity)
    still = draw(cameras, step=1)
    assert torch.equal(still.opacity, draw(cameras, step=2).opacity) and (still.background == 1).all()
    steady = renderer(geometry, jitter=False)
    assert torch.equal(steady(cameras, step=1, rng=Rng(1)).opacity, steady(cameras, step=2, rng=Rng(1)).opacity)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rays_that_miss_show_the_background_and_can_be_differentiated():
    geometry = volume()
    away = orbit(*(torch.tensor([x]) for x in (0.0, 0.0, 3.0, 10.0)), 4, 4, target=torch.tensor([[9.0, 0.0, 0.0]]))
    render = renderer(geometry)(away, step=0, rng=Rng(), needs={"normal"})
    assert torch.equal(render.rgb, render.background) and (render.opacity == 0).all() and (render.depth == 0).all()
    render.rgb.sum().backward()
    assert geometry.table.grad is None or (geometry.table.grad == 0).all()


def test_update_step_follows_its_schedule_and_is_the_same_on_every_rank():
    geometry = volume(grid={"coarse_to_fine": {"start_level": 1, "every": 10}})
    first, second = renderer(geometry), renderer(geometry)
    for step in range(33):
        first.update_step(step, Rng(seed=2, rank=0))
        second.update_step(step, Rng(seed=2, rank=1))
    assert first.occupancy.num_updates == 3 and geometry.num_active_levels == 3
    assert torch.equal(first.occupancy.density, second.occupancy.density)


def test_state_holds_the_occupancy_and_nothing_of_the_parts():
    draw = renderer(volume())
    assert all(key.startswith("occupancy.") for key in draw.state_dict()) and draw.parameter_groups() == []
    assert list(draw.parameters()) == []
    draw.update_step(0, Rng())
    restored = renderer(volume())
    restored.load_state_dict(draw.state_dict())
    assert torch.equal(restored.occupancy.occupied, draw.occupancy.occupied)


def test_unmatched_features_are_refused():
    with pytest.raises(ValueError, match=r"set geometry\.num_features=3"):
        renderer(volume(num_features=5))


@pytest.mark.parametrize(
    ("options", "message"), [({"num_samples": 1}, "num_samples"), ({"backend": "cuda"}, "backend")]
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        renderer(volume(), **options)
