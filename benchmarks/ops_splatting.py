"""Gaussian splatting rows of ``ops.py``: projection and compositing by every backend and by gsplat alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from ops_common import Row, cameras_around, differentiate, usable
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.ops.splatting import splat as splatting

CPU_SIZES = ("5000@128", "20000@256")
CUDA_SIZES = (*CPU_SIZES, "100000@512")


@dataclass(frozen=True)
class Gaussians:
    """N Gaussians in the unit ball."""

    means: Tensor
    scales: Tensor
    quaternions: Tensor
    colors: Tensor
    opacities: Tensor

    def moving(self) -> Gaussians:
        """Copy in which all tensors require gradients."""
        return Gaussians(*(tensor.clone().requires_grad_() for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.means, self.scales, self.quaternions, self.colors, self.opacities


@dataclass(frozen=True)
class View:
    """Camera parameters in the conventions of both pipelines, so that conversions are not measured."""

    size: int
    w2c: Tensor
    focal: Tensor
    opencv: Tensor
    intrinsics: Tensor


# Gaussians and cameras to color, opacity and depth.
Pipeline = Callable[[Gaussians, View], list[Tensor]]


def parse_size(text: str) -> tuple[int, int]:
    """Number of Gaussians and pixels per side, from a string such as "5000@128"."""
    count, _, size = text.partition("@")
    if not (count.isdigit() and size.isdigit()):
        raise argparse.ArgumentTypeError(f"expected GAUSSIANS@PIXELS such as 5000@128, got {text!r}")
    return int(count), int(size)


def random_gaussians(count: int, device: torch.device) -> Gaussians:
    """Uniform in the unit ball, with scales of about half their mean spacing (two or three pixels at these sizes)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    means = directions * torch.rand(count, 1, generator=generator) ** (1 / 3)
    spacing = (4 / 3 * math.pi / count) ** (1 / 3)
    scales = spacing * (0.2 + 0.4 * torch.rand(count, 3, generator=generator))
    quaternions = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1)
    colors = torch.rand(count, 3, generator=generator)
    opacities = 0.1 + 0.8 * torch.rand(count, generator=generator)
    return Gaussians(*(tensor.to(device) for tensor in (means, scales, quaternions, colors, opacities)))


def splatting_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    names = usable(splatting.BACKENDS, device)
    pipelines: list[tuple[str, Pipeline]] = [(name, partial(ours, name)) for name in names]
    if "gsplat" in names:
        pipelines.append(("gsplat.rasterization", gsplat_pipeline))
    default = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    for count, size in arguments.splats or map(parse_size, default):
        gaussians, view = random_gaussians(count, device), view_of(cameras_around(arguments.views, size, device))
        moving = gaussians.moving()
        operator = f"project and splat {count} Gaussians, {arguments.views} x {size}^2"
        for name, pipeline in pipelines:
            yield f"{operator}: forward", name, partial(pipeline, gaussians, view)
            yield f"{operator}: + gradients", name, partial(draw_and_differentiate, pipeline, moving, view)


def view_of(cameras: Cameras) -> View:
    focal = 0.5 * cameras.height / torch.tan(cameras.fovy / 2)
    intrinsics = focal.new_zeros(len(focal), 3, 3)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = 0.5 * cameras.width, 0.5 * cameras.height, 1.0
    opencv = cameras.w2c * focal.new_tensor([1.0, -1.0, -1.0, 1.0])[:, None]
    return View(cameras.height, cameras.w2c, focal, opencv, intrinsics)


def ours(backend: str, gaussians: Gaussians, view: View) -> list[Tensor]:
    shape = (gaussians.means, gaussians.scales, gaussians.quaternions)
    projected = splatting.project(*shape, view.w2c, view.focal, view.size, view.size, backend=backend)
    image = splatting.splat(projected, gaussians.colors, gaussians.opacities, view.size, view.size, backend=backend)
    return [image.color, image.opacity, image.depth]


def gsplat_pipeline(gaussians: Gaussians, view: View) -> list[Tensor]:
    """The same image by gsplat alone, not packed, which is faster if all Gaussians are visible."""
    import gsplat

    inputs = (gaussians.means, gaussians.quaternions, gaussians.scales, gaussians.opacities, gaussians.colors)
    cameras = (view.opencv, view.intrinsics, view.size, view.size)
    image, opacity, _ = gsplat.rasterization(*inputs, *cameras, render_mode="RGB+D", packed=False)
    return [image, opacity]


def draw_and_differentiate(pipeline: Pipeline, gaussians: Gaussians, view: View) -> None:
    differentiate(pipeline(gaussians, view), gaussians.tensors())
