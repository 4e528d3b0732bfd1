"""Regression of features onto a target function, and the samplers of points for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from scoredist3d.meshes.mesh import Mesh
from scoredist3d.seeding import Rng


def fit_features(
    predict: Callable[[Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    points: Callable[[torch.Generator, int], Tensor],
    rng: Rng,
    *,
    steps: int = 300,
    lr: float = 0.02,
    batch_size: int = 2048,
) -> float:
    """Fit ``predict`` to ``target`` by least squares, with Adam and a cosine-decayed learning rate.

    Args:
        predict: Maps (N, 3) points to (N, F), differentiable in ``parameters``.
        target: Maps (N, 3) points to target values (N, F); not differentiated.
        parameters: The parameters to fit, updated in place; their ``grad`` is unchanged.
        points: Maps a generator and N to (N, 3) points; called in every step.
        rng: Source of the points. Only streams that all ranks share are used, so that the ranks stay equal.
        steps: Number of optimizer steps.
        lr: Initial learning rate.
        batch_size: N.

    Returns:
        Root mean square error at new points after the last step.
    """
    device, stream = parameters[0].device, rng.shared()
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), eps=1e-15)

    def squared_error(step: int) -> Tensor:
        where = points(stream("fit", step, device), batch_size)
        with torch.no_grad():
            wanted = target(where)
        return (predict(where) - wanted).square().mean()

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.enable_grad():
            gradients = torch.autograd.grad(squared_error(step), parameters, allow_unused=True)
        held = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for parameter, before in zip(parameters, held, strict=True):
            parameter.grad = before
    with torch.no_grad():
        return math.sqrt(float(squared_error(steps)))


def surface_sampler(mesh: Mesh, like: Tensor) -> Callable[[torch.Generator, int], tuple[Tensor, Tensor]]:
    """Sampler of points on the mesh, uniform by area: (N, 3) points and the unit normals (N, 3) of their faces.

    Args:
        mesh: World coordinates.
        like: Tensor with the device and dtype of the points; the generator must be on the same device.

    Raises:
        ValueError: The mesh has no area.
    """
    triangles = torch.from_numpy(np.ascontiguousarray(mesh.vertices[mesh.faces])).to(like)
    cumulative = torch.from_numpy(mesh.face_areas.cumsum(dtype=np.float64)).to(like.device)
    if len(cumulative) == 0 or not float(cumulative[-1]) > 0:
        raise ValueError("geometry: the mesh to start from has no area; all its faces are degenerate or it has none")

    def sample(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        place = torch.rand(count, generator=generator, device=like.device, dtype=torch.float64)
        face = torch.searchsorted(cumulative, place * cumulative[-1], right=True)
        a, b, c = triangles[face.clamp_max(len(triangles) - 1)].unbind(1)
        root = torch.rand(count, 1, generator=generator, device=like.device).sqrt().to(like)
        along = torch.rand(count, 1, generator=generator, device=like.device).to(like)
        points = (1 - root) * a + root * ((1 - along) * b + along * c)
        return points, nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-30)

    return sample


def points_near(mesh: Mesh, spread: float, like: Tensor) -> Callable[[torch.Generator, int], Tensor]:
    """Sampler of points on the mesh, displaced by N(0, spread^2) along each axis; ``spread`` in scene units."""
    on_surface = surface_sampler(mesh, like)

    def sample(generator: torch.Generator, count: int) -> Tensor:
        points, _ = on_surface(generator, count)
        return points + spread * torch.randn(count, 3, generator=generator, device=like.device).to(like)

    return sample


def points_in_ball(generator: torch.Generator, count: int, radius: float) -> Tensor:
    """(count, 3) points, uniform in the ball of ``radius`` around the origin, on the generator's device."""
    device = generator.device
    direction = nn.functional.normalize(torch.randn(count, 3, generator=generator, device=device), dim=-1)
    return radius * direction * torch.rand(count, 1, generator=generator, device=device) ** (1 / 3)
