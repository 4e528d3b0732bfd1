"""Shared parts of the operator benchmarks: table rows, usable backends, a sphere mesh and cameras around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import trimesh
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.ops import backends

# Operator, backend, and the call to measure.
Row = tuple[str, str, Callable[[], object]]


def usable(supported: tuple[str, ...], device: torch.device) -> list[str]:
    """Backends that are usable on this machine, in the order of ``supported``."""
    names = []
    for name in supported:
        try:
            names.append(backends.choose("benchmark", name, device, supported, torch.float32))
        except ValueError as error:
            print(f"<!-- {error} -->")
    return names


def differentiate(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Compute gradients of the sum of squared outputs, so that upstream gradients differ between pixels."""
    torch.autograd.grad(sum((output.square().sum() for output in outputs), outputs[0].new_zeros(())), wanted)


def sphere(subdivisions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Vertices (V, 3) and int32 faces (20 * 4^subdivisions, 3) of the unit icosphere."""
    mesh = trimesh.creation.icosphere(subdivisions)
    vertices, faces = torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces, dtype=torch.int32)
    return vertices.to(device), faces.to(device)


def cameras_around(views: int, size: int, device: torch.device) -> Cameras:
    """Cameras with square images that the unit ball nearly fills."""
    azimuth = torch.arange(views) * (360.0 / views) + 20.0
    constant = torch.ones(views)
    return orbit(azimuth, 15 * constant, 3.2 * constant, 40 * constant, size, size).to(device)
