"""Deferred back-propagation, patches, maps for losses, and the inputs of materials."""

import pytest
import torch
from shared.volume_scenes import FogBall, build, orbits, renderer_of, rough_volume
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.config.fields import ConfigError
from scoredist3d.materials.base import Material
from scoredist3d.ops.volume_rendering.compositing import accumulate
from scoredist3d.ops.volume_rendering.ray_marching import RaySamples
from scoredist3d.renderers import Render, volume_maps
from scoredist3d.renderers.patch import Patch, PatchConfig, draw_patch
from scoredist3d.renderers.volume import VolumeRenderer
from scoredist3d.seeding import Rng

MAPS = {"normal", "depth_variance", "orientation", "distortion"}
DOUBLE = {"backend": "torch", "num_samples": 24}


def images_of(render: Render) -> dict[str, Tensor]:
    names = ("rgb", "opacity", "depth", *sorted(MAPS))
    return {name: render.get(name) for name in names} | dict(render.auxiliary_losses)


def functional(render: Render) -> Tensor:
    """A fixed random functional of all maps of a render."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64)
    for values in images_of(render).values():
        total = total + (torch.randn(values.shape, generator=generator, dtype=torch.float64) * values).sum()
    return total


@pytest.mark.parametrize("estimator", ["occupancy", "proposal"])
@pytest.mark.parametrize("normal", ["analytic", "finite-difference"])
def test_deferred_gradients_are_the_direct_ones(estimator, normal):
    """Images, maps and gradients of all parameters do not depend on the chunk size."""
    cameras = orbits(0.0, 100.0, dtype=torch.float64)
    results = []
    for chunk in (None, 1000, 50, 7):
        geometry = rough_volume(torch.float64, normal=normal)
        material = build("material", "diffuse", ambient_only_steps=0, diffuse_probability=1.0)
        draw = renderer_of(geometry, material=material, training_chunk=chunk, estimator=estimator, **DOUBLE).double()
        render = draw(cameras, step=3, rng=Rng(1), needs=MAPS)
        functional(render).backward()
        gradients = {name: p.grad for part in (geometry, draw) for name, p in part.named_parameters()}
        results.append((images_of(render), gradients))
    assert all(float(gradient.abs().max()) > 0 for gradient in results[0][1].values())
    for images, gradients in results[1:]:
        torch.testing.assert_close(images, results[0][0], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(gradients, results[0][1], atol=1e-10, rtol=1e-8)


def live_samples(draw: VolumeRenderer, cameras: Cameras) -> tuple[int, int]:
    """The largest number of samples in a graph at one time of a step, and the total number of samples in graphs."""
    alive, most, total = 0, 0, 0

    def freed(count: int) -> None:
        nonlocal alive
        alive -= count

    class Alive(torch.autograd.Function):
        @staticmethod
        def forward(ctx, density):
            nonlocal alive, most, total
            ctx.count = len(density)
            if density.requires_grad:
                alive += len(density)
                total += len(density)
                most = max(most, alive)
            return density.clone()

        @staticmethod
        def backward(ctx, gradient):
            freed(ctx.count)
            return gradient

    def watch(_, __, output):
        if torch.is_grad_enabled():
            return type(output)(Alive.apply(output.density), output.features, output.normal)
        return output

    with draw.geometry.register_forward_hook(watch):
        draw(cameras, step=0, rng=Rng()).rgb.sum().backward()
    assert alive == 0
    return most, total


def test_live_samples_are_bounded_by_the_chunk():
    cameras = orbits(0.0, 100.0, size=16)
    options = {"num_samples": 32, "occupancy": {"enabled": False}, "min_transmittance": 0.0}
    whole = live_samples(renderer_of(rough_volume(), **options), cameras)
    chunked = live_samples(renderer_of(rough_volume(), training_chunk=32, **options), cameras)
    assert whole[0] == whole[1] == chunked[1]  # the same total
    assert chunked[0] <= 32 * 33 < whole[0] / 4


def test_a_patch_is_that_part_of_the_image_and_the_rest_has_no_gradient():
    """The patch is at the center without a random stream and at random positions in training, inside a coarse view."""
    geometry, cameras = rough_volume(), orbits(0.0, 100.0, size=16)
    options = {"jitter": False, "num_samples": 48}
    whole = renderer_of(geometry, **options)(cameras, step=0, rng=Rng(), needs=MAPS)
    draw = renderer_of(geometry, patch={"size": 6, "downsample": 4}, **options)
    places = set()
    for step in range(4):
        render = draw(cameras, step=step, rng=Rng(), needs=MAPS)
        (gradient,) = torch.autograd.grad(render.opacity.sum(), geometry.network.biases[-1], retain_graph=True)
        assert float(gradient[0]) > 0
        same = ((render.opacity - whole.opacity).abs() < 1e-6).all(0)[..., 0]
        rows, columns = same.all(1), same.all(0)
        place = find_square(render.opacity, whole.opacity, 6)
        places.add(place)
        patch = Patch(*place, 6, 6)
        for name, values in images_of(render).items():
            torch.testing.assert_close(patch.cut(values), patch.cut(images_of(whole)[name]), atol=1e-5, rtol=1e-5)
        assert not (rows.all() or columns.all())
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[place[0] : place[0] + 6, place[1] : place[1] + 6] = True
        outside = render.opacity[:, ~inside].sum()
        (nothing,) = torch.autograd.grad(outside, geometry.network.biases[-1], allow_unused=True)
        assert nothing is None or float(nothing.abs().max()) == 0
        # The coarse view shows the same object.
        assert (render.opacity - whole.opacity).abs().mean() < 0.1
    assert len(places) > 1


@pytest.mark.parametrize("name", ["sparsity", "opaque", "distortion", "rgb"])
def test_the_gradient_of_a_mean_over_pixels_is_that_over_the_patch(name):
    """The mean gradient does not depend on the patch size, so loss weights keep their meaning."""
    cameras = orbits(0.0, 100.0, size=12, dtype=torch.float64)

    def gradient(place: Patch | None, **options) -> Tensor:
        geometry = rough_volume(torch.float64)
        draw = renderer_of(geometry, jitter=False, **options, **DOUBLE).double()
        render = draw(cameras, step=0, needs={"distortion"})
        if place is not None:
            cut = {key: place.cut(render.get(key)) for key in ("rgb", "opacity", "depth", "background", "distortion")}
            render = Render(**cut)
        term = render.rgb.mean() if name == "rgb" else build("loss", name)(render, geometry, 0, Rng())
        found: Tensor = torch.autograd.grad(term, geometry.table)[0]
        return found

    pasted = gradient(None, patch={"size": 4, "downsample": 3})
    expected = gradient(Patch(4, 4, 4, 4))  # the center, without a random stream
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(pasted, expected, atol=1e-12, rtol=1e-8)


def test_pasting_keeps_values_and_makes_up_for_the_patchs_share():
    """The patch has 6 of 48 pixels."""
    patch, values = Patch(1, 2, 2, 3), torch.arange(12.0).view(1, 2, 3, 2).requires_grad_()
    pasted = patch.paste(values, torch.zeros(1, 2, 2, 2), 6, 8)
    assert torch.equal(patch.cut(pasted), values) and pasted.sum() == values.sum()
    pasted.square().sum().backward()
    torch.testing.assert_close(values.grad, 8.0 * 2.0 * values.detach())


def test_the_place_of_a_patch_is_drawn_on_the_host():
    """The position is drawn on the CPU: it is also known for cameras on the meta device, which have no values."""
    config, cameras = PatchConfig(size=3), orbits(0.0, size=16)
    found = [draw_patch(config, where, Rng(5), step) for step in range(6) for where in (cameras, cameras.to("meta"))]
    assert found[::2] == found[1::2] and len({(patch.top, patch.left) for patch in found if patch}) > 3
    assert draw_patch(config, cameras, None, 0) == Patch(7, 7, 3, 3)


def find_square(images: Tensor, whole: Tensor, size: int) -> tuple[int, int]:
    """The position at which a square of pixels matches the whole image best."""
    difference = (images - whole).abs().sum(dim=(0, 3))[None]
    cost = torch.nn.functional.avg_pool2d(difference, size, stride=1)[0]
    return divmod(int(cost.argmin()), cost.shape[1])


def test_evaluation_and_small_images_ignore_the_patch():
    geometry, cameras = rough_volume(), orbits(0.0, size=8)
    draw, whole = renderer_of(geometry, patch={"size": 4}), renderer_of(geometry)
    with torch.no_grad():
        assert torch.equal(draw(cameras, step=0).rgb, whole(cameras, step=0).rgb)
    large = renderer_of(geometry, patch={"size": 8})
    assert torch.equal(large(cameras, step=0, rng=Rng()).rgb, whole(cameras, step=0, rng=Rng()).rgb)


def test_patches_and_chunks_go_together():
    cameras = orbits(0.0, 100.0, size=12, dtype=torch.float64)
    gradients = []
    for chunk in (None, 11):
        geometry = rough_volume(torch.float64)
        draw = renderer_of(geometry, patch={"size": 5, "downsample": 3}, training_chunk=chunk, **DOUBLE).double()
        functional(draw(cameras, step=3, rng=Rng(1), needs=MAPS)).backward()
        gradients.append([p.grad for p in geometry.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-10, rtol=1e-8)


def random_samples(num_rays: int = 5) -> tuple[RaySamples, Tensor, Tensor]:
    """Rays with 0 to 4 intervals, their weights, and how many each has."""
    generator = torch.Generator().manual_seed(2)
    counts = torch.tensor([3, 0, 4, 1, 2])[:num_rays]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    rays = torch.arange(num_rays).repeat_interleave(counts)
    starts = 2.0 + torch.cat([torch.rand(n, generator=generator, dtype=torch.float64).sort().values for n in counts])
    samples = RaySamples(rays, starts, starts + 0.03, offsets, num_rays)
    return samples, torch.rand(len(rays), generator=generator, dtype=torch.float64).requires_grad_(), counts


def test_distortion_is_the_double_sum():
    samples, weights, _ = random_samples()
    expected = []
    for ray in range(5):
        own = samples.ray_indices == ray
        w, t, dt = weights[own], samples.midpoints[own], samples.lengths[own]
        pairs = (w[:, None] * w[None] * (t[:, None] - t[None]).abs()).sum()
        expected.append((pairs + (w.square() * dt).sum() / 3) / 2.5)
    result = volume_maps.distortion(weights, samples, 2.5)
    torch.testing.assert_close(result[:, 0], torch.stack(expected))
    mix = torch.tensor([0.3, 1.0, -2.0, 0.7, 1.1], dtype=torch.float64)
    first, second = (
        torch.autograd.grad((values * mix).sum(), weights)[0] for values in (result[:, 0], torch.stack(expected))
    )
    torch.testing.assert_close(first, second)


def test_depth_variance_by_hand():
    """Weights 0.6 and 0.2 at 1 and 2: mean 1.25, variance (0.6 * 0.0625 + 0.2 * 0.5625) / 0.8 = 0.1875."""
    starts = torch.tensor([0.95, 1.95, 2.95])
    samples = RaySamples(torch.tensor([0, 0, 2]), starts, starts + 0.1, torch.tensor([0, 2, 2, 3]), 3)
    weights = torch.tensor([0.6, 0.2, 0.9])
    opacity = accumulate(weights, None, samples)
    depth = torch.tensor([[1.25], [0.0], [3.0]])
    result = volume_maps.depth_variance(weights, samples, depth, opacity)
    torch.testing.assert_close(result, torch.tensor([[0.1875], [0.0], [0.0]]), atol=1e-6, rtol=0)


def test_facing_away_by_hand():
    """Ray 0 (towards -x): one normal faces the camera (0), one faces away with n . v = 0.6; ray 2: n . v = 1."""
    starts = torch.tensor([0.95, 1.95, 2.95])
    samples = RaySamples(torch.tensor([0, 0, 2]), starts, starts + 0.1, torch.tensor([0, 2, 2, 3]), 3)
    weights = torch.tensor([0.5, 0.25, 0.1], requires_grad=True)
    normals = torch.tensor([[1.0, 0.0, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, -1.0]], requires_grad=True)
    view_dirs = -torch.eye(3)[samples.ray_indices]
    result = volume_maps.orientation(weights, samples, normals, view_dirs)
    torch.testing.assert_close(result[:, 0], torch.tensor([0.25 * 0.36, 0.0, 0.1]))
    result.sum().backward()
    assert weights.grad is None  # only the normals get a gradient
    # The gradient is 2 w (n . v) v: sample 1 has v = -x, sample 2 has v = -z.
    torch.testing.assert_close(normals.grad, torch.tensor([[0.0, 0.0, 0.0], [-0.3, 0.0, 0.0], [0.0, 0.0, -0.2]]))


def test_maps_of_a_ball_of_fog():
    """Center ray: exponential absorption with rate s over the length 2; the visible normals face the camera."""
    draw = renderer_of(FogBall(3.0), num_samples=400, occupancy={"enabled": False})
    render = draw(orbits(0.0, size=1), step=0, needs=draw.outputs)
    t = (torch.arange(400_000) + 0.5) * (2.0 / 400_000)
    w = 3.0 * torch.exp(-3.0 * t.double()) * (2.0 / 400_000)
    mean = (w * t).sum() / w.sum()
    assert render.depth_variance.item() == pytest.approx(float((w * (t - mean) ** 2).sum() / w.sum()), rel=2e-3)
    # Normals in the second half of the ray point along the ray.
    assert render.orientation.item() == pytest.approx(float(w[200_000:].sum()), rel=1e-2)
    before, moment = w.cumsum(0) - w, (w * t).cumsum(0) - w * t
    pairs = 2 * (w * (t * before - moment)).sum() / 2.0
    assert render.distortion.item() == pytest.approx(float(pairs), rel=1e-2)
    towards = orbits(0.0, size=1).origins[0] * (3.0 - render.depth.item()) / 3.0
    torch.testing.assert_close(render.position[0, 0, 0], towards, atol=1e-4, rtol=0)
    assert not render.position.requires_grad


class Directions(Material):
    """A material with four channels: the view direction v, and n . v."""

    num_channels = 4
    needs_normal = True
    needs_view_dirs = True

    def forward(self, inputs):
        along = (inputs.normals * inputs.view_dirs).sum(-1, keepdim=True)
        return torch.cat([inputs.view_dirs, along], dim=-1)

    def channels(self, inputs):
        raise NotImplementedError


@pytest.mark.parametrize("estimator", ["occupancy", "importance"])
def test_materials_get_what_they_need_and_keep_their_channels(estimator):
    cameras = orbits(0.0, 90.0, size=5)
    draw = VolumeRenderer(
        VolumeRenderer.Config(estimator=estimator),
        geometry=FogBall(50.0),
        material=Directions(Directions.Config()),
        background=lambda directions, generator=None: torch.zeros(*directions.shape[:-1], 4),  # type: ignore[arg-type]
    )
    for render in (draw(cameras, step=0), draw(cameras, step=0, needs={"normal"})):
        assert render.rgb.shape == (2, 5, 5, 4)
        middle = render.rgb[:, 2, 2]
        torch.testing.assert_close(middle[:, :3], cameras.rays().directions[:, 2, 2], atol=1e-3, rtol=0)
        torch.testing.assert_close(middle[:, 3], -torch.ones(2), atol=0.01, rtol=0)


def test_unknown_maps_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="does not provide the maps sharpness; it provides depth_variance, distortion"):
        renderer_of(rough_volume())(orbits(0.0), step=0, needs={"sharpness"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "guess"}, "estimator"),
        ({"training_chunk": 0}, "training_chunk"),
        ({"patch": {"size": 0}}, "size"),
        ({"patch": {"downsample": 0}}, "downsample"),
        ({"resampling": {"coarse_samples": 1}}, "coarse_samples"),
        ({"proposal": {"num_levels": 0}}, "num_levels"),
    ],
)
def test_bad_renderer_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        renderer_of(rough_volume(), **options)
