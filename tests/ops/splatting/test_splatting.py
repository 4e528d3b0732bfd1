"""Compositing of Gaussians: closed forms, a dense reference, and the C kernel against torch."""

import pytest
import torch
from splatting_scenes import NAMES, all_gradients, assert_agree, camera, dense, flat, random_scene, render

from scoredist3d.ops import native
from scoredist3d.ops.splatting.splat import project, splat
from scoredist3d.ops.splatting.tiles import assign_tiles
from scoredist3d.ops.splatting.types import ProjectedGaussians

needs_native = pytest.mark.skipif(not native.available(), reason=f"no C kernels: {native.unavailable_reason()}")
CPU_BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_gaussian_in_front_of_the_camera(backend):
    """An isotropic Gaussian (s) at depth z on the axis has the image variance (f s / z)^2 + 0.3."""
    height, width, focal, sigma, depth, peak = 37, 45, 60.0, 0.2, 3.0, 0.8
    scene = {
        "means": torch.zeros(1, 3),
        "scales": torch.full((1, 3), sigma),
        "quaternions": torch.tensor([[0.3, -0.5, 0.7, 0.1]]),
        "colors": torch.tensor([[0.2, 1.0, -0.5]]),
        "opacities": torch.tensor([peak]),
        "w2c": camera(),
        "focal": torch.tensor([focal]),
    }
    splats = render(scene, height, width, backend)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    variance = (focal * sigma / depth) ** 2 + 0.3
    alpha = peak * torch.exp(-((x - width / 2) ** 2 + (y - height / 2) ** 2) / (2 * variance))
    alpha = torch.where(alpha >= 1 / 255, alpha, 0.0)
    assert 0 < int((alpha == 0).sum()) < alpha.numel()
    torch.testing.assert_close(splats.opacity[0, ..., 0], alpha, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(splats.color[0], alpha[..., None] * scene["colors"][0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(splats.depth[0, ..., 0], alpha * depth, atol=6e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_nearer_of_two_covers_the_other(backend):
    scene = {
        "means": torch.tensor([[0.0, 0, -1.0], [0.0, 0, 1.0]]),  # the first is farther: the camera is at z = 3
        "scales": torch.full((2, 3), 0.5),
        "quaternions": torch.tensor([[1.0, 0, 0, 0]] * 2),
        "colors": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "opacities": torch.tensor([0.5, 0.6]),
        "w2c": camera(),
        "focal": torch.tensor([30.0]),
    }
    splats = render(scene, 15, 15, backend)  # odd: the centre is a pixel's centre
    far, near = 0.4 * 0.5, 0.6
    torch.testing.assert_close(splats.color[0, 7, 7], torch.tensor([far, near]))
    torch.testing.assert_close(splats.opacity[0, 7, 7], torch.tensor([far + near]))
    torch.testing.assert_close(splats.depth[0, 7, 7], torch.tensor([far * 4 + near * 2]))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_turning_scene_and_camera_together_changes_nothing(backend):
    scene = random_scene(60, 3)
    angle = torch.tensor(0.9)
    turn = torch.tensor([[angle.cos(), 0, angle.sin()], [0, 1, 0], [-angle.sin(), 0, angle.cos()]])
    half = torch.tensor([torch.cos(angle / 2), 0, torch.sin(angle / 2), 0])
    w, v = scene["quaternions"][:, :1], scene["quaternions"][:, 1:]
    turned = dict(scene)
    turned["means"] = scene["means"] @ turn.T
    turned["quaternions"] = (
        3
        * torch.cat(  # also longer: it is normalised inside
            [
                half[0] * w - v @ half[1:, None],
                half[0] * v + w * half[1:] + torch.linalg.cross(half[1:].expand_as(v), v),
            ],
            dim=1,
        )
    )
    turned["w2c"] = scene["w2c"].clone()
    turned["w2c"][:, :3, :3] = scene["w2c"][:, :3, :3] @ turn.T
    a, b = (render(s, 40, 40, backend) for s in (scene, turned))
    assert a.opacity.max() > 0.5
    for name in ("color", "opacity", "depth"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_tiles_lose_nothing(backend, antialiased):
    scene = random_scene(150, 2, batch=2, scale=0.15)
    height, width = 35, 50
    tensors = [scene[name] for name in ("means", "scales", "quaternions", "w2c", "focal")]
    projected = project(*tensors, height, width, antialiased=antialiased)
    found = splat(projected, scene["colors"], scene["opacities"], height, width, backend=backend)
    weight = projected.compensation[0] if antialiased else torch.ones(150)
    second = projected.compensation[1] if antialiased else torch.ones(150)
    for b, compensation in enumerate((weight, second)):
        one = ProjectedGaussians(*(getattr(projected, n)[b : b + 1] for n in ("means2d", "conics", "depth", "radius")),
                        projected.stds[b : b + 1], projected.visible[b : b + 1])  # fmt: skip
        expected = dense(one, scene["colors"], scene["opacities"] * compensation, height, width)
        for name in ("color", "opacity", "depth"):
            torch.testing.assert_close(getattr(found, name)[b], getattr(expected, name)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_opaque_stack_ends_before_the_last_light(backend):
    """alpha is at most 0.999: the first leaves 1e-3; the second would leave 1e-6 and is not drawn."""
    means2d, depth = torch.full((3, 2), 8.5), torch.tensor([3.0, 1.0, 2.0])
    projected = flat(means2d, 4 * torch.eye(2).repeat(3, 1, 1), depth)
    colors = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    splats = splat(projected, colors, torch.ones(3), 17, 17, backend=backend)
    torch.testing.assert_close(splats.color[0, 8, 8], torch.tensor([0, 0.999, 0]))
    torch.testing.assert_close(splats.opacity[0, 8, 8, 0], torch.tensor(0.999))


@pytest.mark.parametrize("dilation", [0.3, 1.0])
def test_torch_gradients_by_finite_differences(dilation):
    scene = random_scene(4, 2, batch=2, seed=2, scale=0.3, dtype=torch.float64)
    scene["opacities"] = scene["opacities"] * 0.5 + 0.2

    def function(*tensors):
        splats = render(dict(zip(NAMES, tensors, strict=True)), 7, 9, dilation=dilation, antialiased=dilation == 0.3)
        return splats.color, splats.opacity, splats.depth

    # Wide Gaussians and few pixels: no pixel crosses the threshold of 1/255 within a step, which would be a jump.
    scene["focal"] = torch.tensor([6.0, 7.0], dtype=torch.float64)
    inputs = tuple(scene[name].requires_grad_() for name in NAMES)
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


@needs_native
@pytest.mark.parametrize(
    ("count", "channels", "batch", "size", "scale", "antialiased"),
    [
        (200, 3, 1, (33, 50), 0.1, False),  # 4 channels with the depth: unrolled in C
        (150, 1, 2, (48, 16), 0.03, True),
        (400, 3, 1, (40, 40), 0.4, False),  # many finish pixels
        (90, 17, 2, (19, 23), 0.15, False),
        (60, 63, 1, (5, 70), 0.2, True),
    ],
)
def test_native_equals_torch(count, channels, batch, size, scale, antialiased):
    scene = random_scene(count, channels, batch, seed=count, scale=scale)
    found, expected = (all_gradients(scene, *size, name, antialiased=antialiased) for name in ("native", "torch"))
    assert expected["opacity"].max() > 0.5
    assert_agree(found, expected, 2e-5)


@needs_native
def test_colors_of_each_camera():
    scene = random_scene(80, 3, batch=2)
    scene["colors"] = torch.stack([scene["colors"], 1 - scene["colors"]])
    found, expected = (all_gradients(scene, 30, 30, name) for name in ("native", "torch"))
    assert_agree(found, expected, 2e-5)


@needs_native
def test_native_is_deterministic_for_any_number_of_threads():
    scene, before = random_scene(500, 5, batch=2, scale=0.2), torch.get_num_threads()
    projected = project(*(scene[n] for n in ("means", "scales", "quaternions", "w2c", "focal")), 50, 70)
    weights = torch.randn(2, 50, 70, 7, generator=torch.Generator().manual_seed(0))
    colors, opacities = scene["colors"].expand(2, -1, -1), scene["opacities"]
    inputs = [t.clone().requires_grad_() for t in (projected.means2d, projected.conics, projected.depth, colors)]
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            same = ProjectedGaussians(*inputs[:3], projected.radius, projected.stds, projected.visible)
            splats = splat(same, inputs[3], opacities, 50, 70, backend="native")
            image = torch.cat([splats.color, splats.opacity, splats.depth], dim=-1)
            results.append([image.detach(), *torch.autograd.grad(image, inputs, weights)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(gradient.any() for gradient in results[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", ["none", "behind", "beside", "transparent"])
def test_nothing_to_see(backend, case):
    scene = random_scene(0 if case == "none" else 20, 3, batch=2)
    if case == "behind":
        scene["means"][:] = torch.tensor([0.0, 0.0, 5.0])
        scene["w2c"] = camera(1).repeat(2, 1, 1)
    if case == "beside":
        scene["means"][:] = torch.tensor([0.0, 500.0, 0.0])
    if case == "transparent":
        scene["opacities"][:] = 0.0
    found = all_gradients(scene, 20, 33, backend)
    for name in ("color", "opacity", "depth"):
        assert found[name].shape[:3] == (2, 20, 33) and not found[name].any()
    for name in NAMES[:5]:
        gradient = found[f"gradient of {name}"]
        assert gradient is None or not gradient.any()


def test_lists_hold_the_pairs_that_matter():
    """Sorted by tile and depth; rows of a Gaussian are consecutive; every pixel with alpha >= 1/255 is covered."""
    scene = random_scene(100, 1, batch=2)
    projected = project(*(scene[n] for n in ("means", "scales", "quaternions", "w2c", "focal")), 40, 70)
    opacities = scene["opacities"].expand(2, -1)
    lists = assign_tiles(projected, opacities, 40, 70)
    depth = projected.depth.reshape(-1)
    assert lists.offsets[0] == 0 and lists.offsets[-1] == len(lists) and lists.grid == (3, 5)
    for tile in range(2 * 3 * 5):
        inside = lists.gaussians[lists.offsets[tile] : lists.offsets[tile + 1]]
        assert (inside // 100 == tile // 15).all() and (depth[inside].diff() >= 0).all()
        assert len(inside.unique()) == len(inside)
    by_row = torch.empty(len(lists), dtype=torch.long)
    by_row[lists.rows] = lists.gaussians
    assert torch.equal(by_row, torch.repeat_interleave(torch.arange(200), lists.row_offsets.diff()))
    # A faint Gaussian is listed in fewer tiles than an opaque one.
    assert len(assign_tiles(projected, opacities * 0 + 0.02, 40, 70)) < len(
        assign_tiles(projected, opacities * 0 + 1, 40, 70)
    )


def test_gradient_of_the_image_plane_means_can_be_read():
    scene = random_scene(30, 3)
    scene["means"].requires_grad_()
    projected = project(*(scene[n] for n in ("means", "scales", "quaternions", "w2c", "focal")), 32, 32)
    projected.means2d.retain_grad()
    splat(projected, scene["colors"], scene["opacities"], 32, 32).color.square().sum().backward()
    seen = projected.means2d.grad.norm(dim=-1) > 0
    assert seen.any() and not (seen & ~projected.visible).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.ones(5, 2)}, r"scales must be \(5, 3\)"),
        ({"quaternions": torch.ones(5, 3)}, r"quaternions must be \(5, 4\)"),
        ({"w2c": torch.ones(1, 3, 4)}, r"w2c must be \(1, 4, 4\)"),
        ({"focal": torch.ones(2)}, r"focal must be \(1,\)"),
        ({"focal": torch.ones(1, dtype=torch.float64)}, "focal .*must have the dtype and device of means"),
        ({"colors": torch.ones(4, 3)}, r"colors must be \(5, C\)"),
        ({"colors": torch.ones(5, 64)}, "from 1 to 63 channels, got 64"),
        ({"opacities": torch.ones(5, 1)}, r"opacities must be \(5,\)"),
        ({"opacities": torch.ones(5, dtype=torch.float64)}, "opacities .*must have the dtype and device of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        render(random_scene(5, 3) | change, 8, 8)


def test_wrong_settings_are_named():
    scene = random_scene(5, 3)
    for options, message in (({"near": 0.0}, "near must be > 0"), ({"dilation": -1.0}, "dilation >= 0")):
        with pytest.raises(ValueError, match=message):
            render(scene, 8, 8, **options)
    with pytest.raises(ValueError, match="height and width must be 1 or more, got 0 and 8"):
        render(scene, 0, 8)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        render(scene, 8, 8, backend="cuda")
