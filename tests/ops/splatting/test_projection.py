"""Projection of 3D Gaussians: closed forms and the true perspective."""

import math

import torch
from splatting_scenes import camera, random_scene

from scoredist3d.ops.splatting.splat import project


def test_axes_of_the_image():
    """Camera axes are x right, y up; row 0 is the top row; the image center is between pixels for even sizes."""
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


def test_antialiasing_keeps_the_light_of_small_gaussians():
    """Dilation multiplies the area by sqrt(det dilated / det), which the compensation cancels."""
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
    """In float32, xx yy - xy^2 is dominated by rounding here, but the conic must agree with float64."""
    scales, quaternion = torch.tensor([[30.0, 1e-4, 1e-4]]), torch.tensor([[math.cos(0.35), 0, 0, math.sin(0.35)]])
    conics = []
    for dtype in (torch.float32, torch.float64):
        arguments = (torch.zeros(1, 3), scales, quaternion)
        projected = project(
            *(t.to(dtype) for t in arguments), camera(dtype=dtype), torch.tensor([500.0], dtype=dtype), 64, 64
        )
        conics.append(projected.conics.double())
    torch.testing.assert_close(conics[0], conics[1], rtol=1e-5, atol=0)
