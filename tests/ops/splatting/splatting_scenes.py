"""Random scenes and reference renderings for the tests of Gaussian splatting."""

import torch

from scoredist3d.ops.splatting.constants import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE
from scoredist3d.ops.splatting.splat import project, splat
from scoredist3d.ops.splatting.types import ProjectedGaussians, SplattedImages

GAUSSIANS = ("means", "scales", "quaternions", "colors", "opacities")
NAMES = (*GAUSSIANS, "w2c", "focal")


def camera(batch: int = 1, distance: float = 3.0, dtype=torch.float32) -> torch.Tensor:
    """World-to-camera matrices (B, 4, 4): from the +z axis to the origin, each camera rotated further."""
    angle = 0.3 * torch.arange(batch, dtype=dtype)
    w2c = torch.eye(4, dtype=dtype).repeat(batch, 1, 1)
    w2c[:, 0, 0] = w2c[:, 2, 2] = angle.cos()
    w2c[:, 0, 2], w2c[:, 2, 0] = angle.sin(), -angle.sin()
    w2c[:, 2, 3] = -distance
    return w2c


def random_scene(count: int, channels: int, batch: int = 1, seed: int = 0, scale: float = 0.1, dtype=torch.float32):
    """Random Gaussians around the origin, some behind the cameras or beside the image, as a dict by NAMES."""
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


def render(scene: dict, height: int, width: int, backend: str = "torch", **options) -> SplattedImages:
    tensors = [scene[name] for name in ("means", "scales", "quaternions", "w2c", "focal")]
    projected = project(*tensors, height, width, backend=backend, **options)
    return splat(projected, scene["colors"], scene["opacities"], height, width, backend=backend)


def all_gradients(
    scene: dict, height: int, width: int, backend: str, *, upstream_seed: int = 1, moving: tuple = NAMES, **options
):
    """Images, and gradients of the inputs in ``moving`` and of the image-plane quantities."""
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
    """Compare all tensors with a tolerance relative to the largest value of each."""
    for name, reference in expected.items():
        assert found[name].shape == reference.shape
        scale = float(reference.detach().abs().max())
        error = float((found[name] - reference).detach().abs().max())
        assert error <= tolerance * max(scale, 1e-6), f"{name}: {error:.2e} of {scale:.2e}"


def flat(means2d, covariance, depth) -> ProjectedGaussians:
    """Projected Gaussians of one camera from means (N, 2), covariances (N, 2, 2) and depths (N,)."""
    inverse = torch.linalg.inv(covariance)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], dim=-1)
    deviations = covariance.diagonal(dim1=1, dim2=2).sqrt()
    visible = torch.ones(1, len(depth), dtype=torch.bool)
    return ProjectedGaussians(
        means2d[None], conics[None], depth[None], deviations.amax(1)[None], deviations[None], visible
    )


def dense(projected: ProjectedGaussians, colors, opacities, height: int, width: int) -> SplattedImages:
    """Reference without tiles: composites every Gaussian at every pixel by the equations."""
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
    return SplattedImages(color, 1 - light[..., None], depth)
