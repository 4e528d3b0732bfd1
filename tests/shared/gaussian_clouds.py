"""Small sets of Gaussians, two views of them, and a training loop with adaptive density control."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.base import ScreenSpaceMeans
from scoredist3d.geometry.gaussians.model import Gaussians
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.ops.splatting.splat import project, splat
from scoredist3d.ops.splatting.types import ProjectedGaussians
from scoredist3d.seeding import Rng
from scoredist3d.training.optimizer import build_optimizer

NAMES = ("means", "log_scales", "quaternions", "opacity_logits", "features")

BUSY = {"start": 2, "every": 2, "end": 100, "grad_threshold": 1e-4, "opacity_reset_every": 5, "size_threshold": 0.05}


def gaussians(*, rng: Rng | None = None, material: Any = None, **options: Any) -> Gaussians:
    return registry.build(
        parse_component("geometry", {"type": "gaussians", **options}), rng=rng or Rng(), material=material
    )


def material(name: str = "unlit", **options: Any) -> Any:
    return registry.build(parse_component("material", {"type": name, **options}))


def icosphere(radius: float = 0.6, subdivisions: int = 3) -> Mesh:
    import trimesh

    made = trimesh.creation.icosphere(subdivisions, radius=radius)
    return Mesh(np.asarray(made.vertices, np.float32), np.asarray(made.faces, np.int64))


def optimizer_of(geometry: Gaussians, name: str = "adam", *, several: bool = False) -> torch.optim.Optimizer:
    groups = geometry.parameter_groups()
    if several:  # as for parts of a scene with an optimizer of their own
        groups[-1] = groups[-1] | {"optimizer": OptimizerConfig(lr=0.1)}
    return build_optimizer(OptimizerConfig(name=name, lr=0.01, eps=1e-8), groups)


def view(geometry: Gaussians, size: int = 24) -> tuple[ProjectedGaussians, Tensor]:
    """The projected Gaussians and their image (2, H, W, 3) from cameras on +x and +y at distance 3."""
    right = torch.tensor([[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], [[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]]])
    w2c = torch.eye(4).repeat(2, 1, 1)
    w2c[:, :3, :3] = right
    w2c[:, 2, 3] = -3.0
    cloud = geometry()
    focal = torch.full((2,), 1.5 * size)
    projected = project(cloud.means, cloud.scales, cloud.quaternions, w2c, focal, size, size)
    geometry.densification.step_pre_backward(ScreenSpaceMeans(projected.means2d, projected.visible, size, size))
    return projected, splat(projected, cloud.features.sigmoid(), cloud.opacities, size, size, backend="torch").color


def train(geometry: Gaussians, optimizer: torch.optim.Optimizer, steps: range, rng: Rng | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        _, color = view(geometry)
        target = torch.linspace(0, 1, 24)[None, :, None, None].expand_as(color)
        (color - target).square().mean().backward()
        optimizer.step()
        geometry.densification.step_post_backward(step, optimizer, rng or Rng())
