"""Regression of a geometry's outputs onto those of the object that it starts from."""

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
    """Move ``parameters`` so that ``predict`` becomes ``target`` (least squares, Adam with a cosine-decayed rate).

    Args:
        predict: (N, 3) points to (N, F), differentiable in ``parameters``.
        target: (N, 3) points to the (N, F) wanted there; not differentiated.
        parameters: What is moved, in place; their ``grad`` is left as it was.
        points: Generator and N to (N, 3) points to look at, fresh in each step.
        rng: The same on every rank gives the same result on every rank; only its shared streams are used.
        steps: Optimiser steps.
        lr: Learning rate at the start.
        batch_size: N.

    Returns:
        Root mean square error over fresh points at the end.
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
    """A sampler of points on the mesh, uniform by area: (N, 3) points and the outward unit normals of their faces.

    Args:
        mesh: World coordinates.
        like: Gives device and dtype of the points; the generator must be on that device.

    Raises:
        ValueError: The mesh has no area.
    """
    triangles = torch.from_numpy(np.ascontiguousarray(mesh.vertices[mesh.faces])).to(like)
    cumulative = torch.from_numpy(mesh.face_areas.cumsum(dtype=np.float64)).to(like.device)
    if len(cumulative) == 0 or not float(cumulative[-1]) > 0:
        raise ValueError("geometry: the mesh to start from has no area: check that its faces are not all degenerate")

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
    """The points of :func:`surface_sampler`, moved by N(0, spread^2) along each axis; ``spread`` in scene units."""
    on_surface = surface_sampler(mesh, like)

    def sample(generator: torch.Generator, count: int) -> Tensor:
        points, _ = on_surface(generator, count)
        return points + spread * torch.randn(count, 3, generator=generator, device=like.device).to(like)

    return sample


def points_in_ball(generator: torch.Generator, count: int, radius: float) -> Tensor:
    """(count, 3) points uniform in the ball of ``radius``, on the generator's device."""
    device = generator.device
    direction = nn.functional.normalize(torch.randn(count, 3, generator=generator, device=device), dim=-1)
    return radius * direction * torch.rand(count, 1, generator=generator, device=device) ** (1 / 3)
