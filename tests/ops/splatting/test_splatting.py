"""Gaussian splatting: closed forms, the true projection, a dense reference, and the C kernel against torch."""

import math

import pytest
import torch

from scoredist3d.ops import native
from scoredist3d.ops.splatting.splat import Projected, Splats, project, splat
from scoredist3d.ops.splatting.tiles import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, assign_tiles

needs_native = pytest.mark.skipif(not native.available(), reason=f"no C kernels: {native.unavailable_reason()}")
CPU_BACKENDS = ["torch", pytest.param("native", marks=needs_native)]
GAUSSIANS = ("means", "scales", "quaternions", "colors", "opacities")
NAMES = (*GAUSSIANS, "w2c", "focal")


def camera(batch: int = 1, distance: float = 3.0, dtype=torch.float32) -> torch.Tensor:
    """(B, 4, 4) world to camera: on the +z axis looking at the origin, turned a little more for each camera."""
    angle = 0.3 * torch.arange(batch, dtype=dtype)
    w2c = torch.eye(4, dtype=dtype).repeat(batch, 1, 1)
    w2c[:, 0, 0] = w2c[:, 2, 2] = angle.cos()
    w2c[:, 0, 2], w2c[:, 2, 0] = angle.sin(), -angle.sin()
    w2c[:, 2, 3] = -distance
    return w2c


def random_scene(count: int, channels: int, batch: int = 1, seed: int = 0, scale: float = 0.1, dtype=torch.float32):
    """Gaussians around the origin, some behind the cameras and some beside the image: a dict by NAMES."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    means = draw(count, 3) * 0.5
    means[::7] *= 6
    return {
        "means": means,
        "scales": (0.5 * draw(count, 3)).exp() * scale,
        "quaternions": draw(count, 4),
        "colors": draw(count, channels),
        "opacities": torch.sigmoid(2 * draw(count)),
        "w2c": camera(batch, dtype=dtype),
        "focal": torch.full((batch,), 40.0, dtype=dtype) + torch.arange(batch),
    }


def render(scene: dict, height: int, width: int, backend: str = "torch", **options) -> Splats:
    tensors = [scene[name] for name in ("means", "scales", "quaternions", "w2c", "focal")]
    projected = project(*tensors, height, width, backend=backend, **options)
    return splat(projected, scene["colors"], scene["opacities"], height, width, backend=backend)


def all_gradients(
    scene: dict, height: int, width: int, backend: str, *, upstream_seed: int = 1, moving: tuple = NAMES, **options
):
    """Images, and the gradients of every input in ``moving`` and of the image-plane quantities."""
    scene = {name: tensor.clone().requires_grad_(name in moving) for name, tensor in scene.items()}
    arguments = [scene[name] for name in ("means", "scales", "quaternions", "w2c", "focal")]
    projected = project(*arguments, height, width, backend=backend, **options)
    inner = {name: getattr(projected, name) for name in ("means2d", "conics", "compensation")}
    inner = {name: tensor for name, tensor in inner.items() if tensor is not None}
    for tensor in inner.values():
        tensor.retain_grad()
    splats = splat(projected, scene["colors"], scene["opacities"], height, width, backend=backend)
    images = {name: getattr(splats, name) for name in ("color", "opacity", "depth")}
    generator = torch.Generator().manual_seed(upstream_seed)
    loss = sum((image * torch.randn(image.shape, generator=generator).to(image)).sum() for image in images.values())
    loss.backward()
    moved = {name: scene[name] for name in moving} | inner
    gradients = {f"gradient of {name}": tensor.grad for name, tensor in moved.items()}
    return {name: image.detach() for name, image in images.items()} | gradients


def assert_agree(found: dict, expected: dict, tolerance: float) -> None:
    """Every tensor to ``tolerance`` times the greatest value of its kind."""
    for name, reference in expected.items():
        assert found[name].shape == reference.shape
        scale = float(reference.detach().abs().max())
        error = float((found[name] - reference).detach().abs().max())
        assert error <= tolerance * max(scale, 1e-6), f"{name}: {error:.2e} of {scale:.2e}"


def flat(means2d, covariance, depth) -> Projected:
    """Gaussians given in the image: (N, 2), (N, 2, 2), (N,), one camera."""
    inverse = torch.linalg.inv(covariance)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], dim=-1)
    deviations = covariance.diagonal(dim1=1, dim2=2).sqrt()
    visible = torch.ones(1, len(depth), dtype=torch.bool)
    return Projected(means2d[None], conics[None], depth[None], deviations.amax(1)[None], deviations[None], visible)


def dense(projected: Projected, colors, opacities, height: int, width: int) -> Splats:
    """No tiles: every Gaussian at every pixel, one after the other as the equations say."""
    batch, _ = projected.depth.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    color = torch.zeros(batch, height, width, colors.shape[-1], dtype=colors.dtype)
    depth = torch.zeros(batch, height, width, 1, dtype=colors.dtype)
    light = torch.ones(batch, height, width, dtype=colors.dtype)
    for b in range(batch):
        live = torch.ones(height, width, dtype=torch.bool)
        for i in projected.depth[b].argsort().tolist():
            if not projected.visible[b, i]:
                continue
            offset = torch.stack([x, y], dim=-1) - projected.means2d[b, i]
            a, c, e = projected.conics[b, i]
            form = a * offset[..., 0] ** 2 + 2 * c * offset[..., 0] * offset[..., 1] + e * offset[..., 1] ** 2
            alpha = (opacities[i] * torch.exp(-0.5 * form)).clamp(max=MAX_ALPHA)
            seen = (alpha >= MIN_ALPHA) & live
            live &= ~(seen & (light[b] * (1 - alpha) <= MIN_TRANSMITTANCE))
            alpha = alpha * (seen & live)
            color[b] += (light[b] * alpha)[..., None] * colors[i]
            depth[b] += (light[b] * alpha)[..., None] * projected.depth[b, i]
            light[b] *= 1 - alpha
    return Splats(color, 1 - light[..., None], depth)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_gaussian_in_front_of_the_camera(backend):
    """A sphere of standard deviation s at depth z on the axis: an isotropic image Gaussian of (f s / z)^2 + 0.3."""
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


def test_axes_of_the_image():
    """x right, y up in the camera; row 0 at the top; the image's centre between the pixels of an even size."""
    means = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 4.0]])
    projected = project(
        means, torch.full((4, 3), 0.1), torch.tensor([[1.0, 0, 0, 0]]).repeat(4, 1), camera(), torch.tensor([12.0]), 10,
        20,
    )  # fmt: skip
    torch.testing.assert_close(projected.means2d[0, :3], torch.tensor([[10.0, 5.0], [14.0, 5.0], [10.0, 1.0]]))
    torch.testing.assert_close(projected.depth[0], torch.tensor([3.0, 3, 3, -1]))
    assert projected.visible.tolist() == [[True, True, True, False]]
    assert projected.count.tolist() == [1, 1, 1, 0] and projected.radius[0, 3] == 0
    torch.testing.assert_close(projected.radius[0, 0], torch.tensor(math.sqrt((0.16 + 0.3) * 2 * math.log(255))))


def test_small_gaussians_project_as_their_samples_do():
    """Covariance in the image = J cov J^T, with J the derivative of the true perspective."""
    scene = random_scene(40, 1, batch=2, scale=0.01, dtype=torch.float64)
    scene["means"] = scene["means"].clamp(-0.6, 0.6)
    height, width = 48, 64
    tensors = [scene[name] for name in ("means", "scales", "quaternions", "w2c", "focal")]
    projected = project(*tensors, height, width, dilation=0.0)
    w, x, y, z = torch.nn.functional.normalize(scene["quaternions"], dim=1).unbind(1)
    for b in range(2):

        def perspective(point, b=b):
            local = scene["w2c"][b] @ torch.cat([point, point.new_ones(1)])
            right, up = local[:2] / -local[2] * scene["focal"][b]
            return torch.stack([width / 2 + right, height / 2 - up])

        for i in range(40):
            vector = torch.tensor([[0, -z[i], y[i]], [z[i], 0, -x[i]], [-y[i], x[i], 0]], dtype=torch.float64)
            turn = torch.linalg.matrix_exp(  # Rodrigues: rotation by 2 atan2(|v|, w) about v
                vector / torch.sqrt(1 - w[i] ** 2) * 2 * torch.acos(w[i])
            )
            jacobian = torch.autograd.functional.jacobian(perspective, scene["means"][i])
            half = jacobian @ turn @ torch.diag(scene["scales"][i])
            a, c, e = projected.conics[b, i]
            conic = torch.stack([torch.stack([a, c]), torch.stack([c, e])])
            torch.testing.assert_close(conic @ half @ half.T, torch.eye(2, dtype=torch.float64), atol=1e-8, rtol=0)
            torch.testing.assert_close(projected.means2d[b, i], perspective(scene["means"][i]))


def test_covariance_is_that_of_projected_samples():
    generator = torch.Generator().manual_seed(0)
    scales, mean = torch.tensor([[0.03, 0.01, 0.02]]), torch.tensor([[0.5, -0.4, 0.2]])
    quaternion, focal = torch.tensor([[0.8, 0.1, -0.5, 0.3]]), torch.tensor([50.0])
    projected = project(mean, scales, quaternion, camera(), focal, 64, 64, dilation=0.0)
    q = torch.nn.functional.normalize(quaternion[0], dim=0)
    noise = torch.randn(200_000, 3, generator=generator) * scales
    axis = q[1:].expand_as(noise)
    points = mean + noise + 2 * torch.linalg.cross(axis, torch.linalg.cross(axis, noise) + q[0] * noise)
    depth = 3 - points[:, 2]
    pixels = torch.stack([32 + 50 * points[:, 0] / depth, 32 - 50 * points[:, 1] / depth], dim=1)
    a, c, e = projected.conics[0, 0].tolist()
    product = torch.tensor([[a, c], [c, e]]) @ torch.cov(pixels.T)
    torch.testing.assert_close(product, torch.eye(2), atol=0.02, rtol=0)


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
        one = Projected(*(getattr(projected, n)[b : b + 1] for n in ("means2d", "conics", "depth", "radius")),
                        projected.deviations[b : b + 1], projected.visible[b : b + 1])  # fmt: skip
        expected = dense(one, scene["colors"], scene["opacities"] * compensation, height, width)
        for name in ("color", "opacity", "depth"):
            torch.testing.assert_close(getattr(found, name)[b], getattr(expected, name)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_opaque_stack_ends_before_the_last_light(backend):
    """alpha is at most 0.999: 1e-3 is left after the first; the second would leave 1e-6, so it is not drawn."""
    means2d, depth = torch.full((3, 2), 8.5), torch.tensor([3.0, 1.0, 2.0])
    projected = flat(means2d, 4 * torch.eye(2).repeat(3, 1, 1), depth)
    colors = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    splats = splat(projected, colors, torch.ones(3), 17, 17, backend=backend)
    torch.testing.assert_close(splats.color[0, 8, 8], torch.tensor([0, 0.999, 0]))
    torch.testing.assert_close(splats.opacity[0, 8, 8, 0], torch.tensor(0.999))


def test_antialiasing_keeps_the_light_of_small_gaussians():
    """Dilation multiplies the area by sqrt(det dilated / det); the compensation takes that back."""
    tiny = torch.tensor([[0.01, 0.02, 0.005]])
    arguments = (torch.zeros(1, 3), tiny, torch.tensor([[1.0, 0, 0, 0]]), camera(), torch.tensor([40.0]), 33, 33)
    totals = []
    for antialiased, dilation in ((True, 0.3), (True, 1.5)):
        projected = project(*arguments, antialiased=antialiased, dilation=dilation)
        a, c, e = projected.conics[0, 0]
        totals.append(projected.compensation[0, 0] * 2 * math.pi / (a * e - c * c).sqrt())
    expected = 2 * math.pi * (40 / 3) ** 2 * 0.01 * 0.02
    torch.testing.assert_close(torch.stack(totals), torch.full((2,), expected), rtol=1e-4, atol=0)


def test_a_long_thin_gaussian_keeps_its_conic():
    """In float32 xx yy - xy^2 of this one is noise; its conic must still be that of float64."""
    scales, quaternion = torch.tensor([[30.0, 1e-4, 1e-4]]), torch.tensor([[math.cos(0.35), 0, 0, math.sin(0.35)]])
    conics = []
    for dtype in (torch.float32, torch.float64):
        arguments = (torch.zeros(1, 3), scales, quaternion)
        projected = project(
            *(t.to(dtype) for t in arguments), camera(dtype=dtype), torch.tensor([500.0], dtype=dtype), 64, 64
        )
        conics.append(projected.conics.double())
    torch.testing.assert_close(conics[0], conics[1], rtol=1e-5, atol=0)


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
            same = Projected(*inputs[:3], projected.radius, projected.deviations, projected.visible)
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
        ({"focal": torch.ones(1, dtype=torch.float64)}, "focal .*must agree"),
        ({"colors": torch.ones(4, 3)}, r"colors must be \(5, C\)"),
        ({"colors": torch.ones(5, 64)}, "from 1 to 63 channels, got 64"),
        ({"opacities": torch.ones(5, 1)}, r"opacities must be \(5,\)"),
        ({"opacities": torch.ones(5, dtype=torch.float64)}, "opacities .*must agree"),
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
