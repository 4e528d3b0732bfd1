"""Barycentric coordinates, depth and interpolated attributes in Triton: CUDA, float32 (in tests: Triton's interpreter).

One kernel computes barycentric coordinates and depth, another interpolates, and each has a gradient kernel. They run
over all pixels and write zeros at pixels without a triangle, which is cheaper than counting the covered pixels first.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops.rasterization.common_triton import OPTIONS, add_position_gradient, channels_per_program

_PIXELS = 128


@triton.jit
def _corner(clip, faces, face, base, hit, x, y, k: tl.constexpr):
    """Corner k of the triangle of each pixel: vertex, (X - x w, Y - y w) with the pixel center (x, y), Z and w."""
    row = base + tl.load(faces + face * 3 + k, mask=hit, other=0)
    px = tl.load(clip + row * 4, mask=hit, other=0.0)
    py = tl.load(clip + row * 4 + 1, mask=hit, other=0.0)
    z = tl.load(clip + row * 4 + 2, mask=hit, other=0.0)
    w = tl.load(clip + row * 4 + 3, mask=hit, other=1.0)
    return row, px - x * w, py - y * w, z, w


@triton.jit
def _weights(px, py, qx, qy, rx, ry, hit):
    """Barycentric weights b_i, and the sum of the cross products, by which they are divided."""
    a, b, c = qx * ry - qy * rx, rx * py - ry * px, px * qy - py * qx
    area = tl.where(hit, (a + b) + c, 1.0)
    return tl.div_rn(a, area), tl.div_rn(b, area), tl.div_rn(c, area), area


@triton.jit
def _center(pixel, height, width):
    """Normalized device coordinates of pixel centers."""
    column, row = pixel % width, pixel // width % height
    x = tl.div_rn((2 * column + 1).to(tl.float32), (width + 0 * column).to(tl.float32)) - 1.0
    return x, 1.0 - tl.div_rn((2 * row + 1).to(tl.float32), (height + 0 * row).to(tl.float32))


@triton.jit(do_not_specialize=["num_vertices"])
def _shade_kernel(
    clip, faces, triangle, barycentric, depth, num_pixels, num_vertices, height, width, PIXELS: tl.constexpr
):  # fmt: skip
    """Barycentric coordinates and depth of PIXELS pixels."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    mask = pixel < num_pixels
    found = tl.load(triangle + pixel, mask=mask, other=0).to(tl.int64)
    hit = found > 0
    face, base = tl.where(hit, found - 1, 0), pixel // width // height * num_vertices
    x, y = _center(pixel, height, width)
    _, px, py, pz, pw = _corner(clip, faces, face, base, hit, x, y, 0)
    _, qx, qy, qz, qw = _corner(clip, faces, face, base, hit, x, y, 1)
    _, rx, ry, rz, rw = _corner(clip, faces, face, base, hit, x, y, 2)
    u, v, t, _ = _weights(px, py, qx, qy, rx, ry, hit)
    w = tl.where(hit, (u * pw + v * qw) + t * rw, 1.0)
    z = tl.div_rn((u * pz + v * qz) + t * rz, w)
    tl.store(barycentric + pixel * 2, tl.where(hit, u, 0.0), mask=mask)
    tl.store(barycentric + pixel * 2 + 1, tl.where(hit, v, 0.0), mask=mask)
    tl.store(depth + pixel, tl.where(hit, z, 1.0), mask=mask)


@triton.jit
def _add_corner(gradient, row, hit, x, y, by_x, by_y, by_z, by_w, WITH_DEPTH: tl.constexpr):
    """Add the gradient of a corner, as returned by :func:`_corner`, to the gradient of its vertex."""
    add_position_gradient(gradient, row, hit, x, y, by_x, by_y, by_w)
    if WITH_DEPTH:
        tl.atomic_add(gradient + row * 4 + 2, by_z, mask=hit, sem="relaxed")


@triton.jit(do_not_specialize=["num_vertices"])
def _shade_gradient_kernel(
    clip, faces, triangle, by_barycentric, by_depth, by_clip, num_pixels, num_vertices, height, width,
    WITH_BARYCENTRIC: tl.constexpr, WITH_DEPTH: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Add the gradient of PIXELS pixels to ``by_clip``."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    found = tl.load(triangle + pixel, mask=pixel < num_pixels, other=0).to(tl.int64)
    hit = found > 0
    face, base = tl.where(hit, found - 1, 0), pixel // width // height * num_vertices
    x, y = _center(pixel, height, width)
    p, px, py, pz, pw = _corner(clip, faces, face, base, hit, x, y, 0)
    q, qx, qy, qz, qw = _corner(clip, faces, face, base, hit, x, y, 1)
    r, rx, ry, rz, rw = _corner(clip, faces, face, base, hit, x, y, 2)
    u, v, t, area = _weights(px, py, qx, qy, rx, ry, hit)
    by_u = tl.zeros((PIXELS,), dtype=tl.float32)
    by_v = tl.zeros((PIXELS,), dtype=tl.float32)
    by_t = tl.zeros((PIXELS,), dtype=tl.float32)
    by_top = tl.zeros((PIXELS,), dtype=tl.float32)
    by_bottom = tl.zeros((PIXELS,), dtype=tl.float32)
    if WITH_BARYCENTRIC:
        by_u += tl.load(by_barycentric + pixel * 2, mask=hit, other=0.0)
        by_v += tl.load(by_barycentric + pixel * 2 + 1, mask=hit, other=0.0)
    if WITH_DEPTH:  # depth = sum b_i z_i / sum b_i w_i
        w = tl.where(hit, (u * pw + v * qw) + t * rw, 1.0)
        by_top += tl.div_rn(tl.load(by_depth + pixel, mask=hit, other=0.0), w)
        by_bottom -= by_top * tl.div_rn((u * pz + v * qz) + t * rz, w)
        by_u += by_top * pz + by_bottom * pw
        by_v += by_top * qz + by_bottom * qw
        by_t += by_top * rz + by_bottom * rw
    mean = by_u * u + by_v * v + by_t * t  # b_i = a_i / sum a
    by_a, by_b, by_c = tl.div_rn(by_u - mean, area), tl.div_rn(by_v - mean, area), tl.div_rn(by_t - mean, area)
    # a = q x r, b = r x p, c = p x q
    _add_corner(by_clip, p, hit, x, y, by_c * qy - by_b * ry, by_b * rx - by_c * qx, by_top * u, by_bottom * u, WITH_DEPTH)  # fmt: skip # noqa: E501
    _add_corner(by_clip, q, hit, x, y, by_a * ry - by_c * py, by_c * px - by_a * rx, by_top * v, by_bottom * v, WITH_DEPTH)  # fmt: skip # noqa: E501
    _add_corner(by_clip, r, hit, x, y, by_b * py - by_a * qy, by_a * qx - by_b * px, by_top * t, by_bottom * t, WITH_DEPTH)  # fmt: skip # noqa: E501


@triton.jit
def _rows(corners, barycentric, triangle, pixel, num_pixels, stride, pixels_per_image):
    """Whether a triangle covers each pixel, the attribute rows of its corners, and their weights."""
    found = tl.load(triangle + pixel, mask=pixel < num_pixels, other=0).to(tl.int64)
    hit = found > 0
    address, base = corners + tl.where(hit, found - 1, 0) * 3, pixel // pixels_per_image * stride
    i = base + tl.load(address, mask=hit, other=0)
    j = base + tl.load(address + 1, mask=hit, other=0)
    k = base + tl.load(address + 2, mask=hit, other=0)
    u = tl.load(barycentric + pixel * 2, mask=hit, other=0.0)
    v = tl.load(barycentric + pixel * 2 + 1, mask=hit, other=0.0)
    return hit, i, j, k, u, v, tl.where(hit, 1.0 - (u + v), 0.0)


@triton.jit(do_not_specialize=["stride"])
def _interpolate_kernel(
    attributes, corners, barycentric, triangle, out, num_pixels, stride, pixels_per_image, num_channels,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Interpolated attributes of PIXELS pixels."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    hit, i, j, k, u, v, t = _rows(corners, barycentric, triangle, pixel, num_pixels, stride, pixels_per_image)
    first = 0
    while first < num_channels:
        channel = (first + tl.arange(0, CHANNELS))[None, :]
        mask = hit[:, None] & (channel < num_channels)
        a = tl.load(attributes + i[:, None] * num_channels + channel, mask=mask, other=0.0)
        b = tl.load(attributes + j[:, None] * num_channels + channel, mask=mask, other=0.0)
        c = tl.load(attributes + k[:, None] * num_channels + channel, mask=mask, other=0.0)
        value = (u[:, None] * a + v[:, None] * b) + t[:, None] * c
        inside = (pixel < num_pixels)[:, None] & (channel < num_channels)
        tl.store(out + pixel[:, None] * num_channels + channel, value, mask=inside)
        first += CHANNELS


@triton.jit(do_not_specialize=["stride"])
def _interpolate_gradient_kernel(
    attributes, corners, barycentric, triangle, upstream, by_attributes, by_barycentric, num_pixels, stride,
    pixels_per_image, num_channels, WITH_ATTRIBUTES: tl.constexpr, WITH_BARYCENTRIC: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients of PIXELS pixels: added to ``by_attributes``, stored in ``by_barycentric``."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    hit, i, j, k, u, v, t = _rows(corners, barycentric, triangle, pixel, num_pixels, stride, pixels_per_image)
    by_u = tl.zeros((PIXELS,), dtype=tl.float32)
    by_v = tl.zeros((PIXELS,), dtype=tl.float32)
    first = 0
    while first < num_channels:
        channel = (first + tl.arange(0, CHANNELS))[None, :]
        mask = hit[:, None] & (channel < num_channels)
        given = tl.load(upstream + pixel[:, None] * num_channels + channel, mask=mask, other=0.0)
        at_i, at_j = i[:, None] * num_channels + channel, j[:, None] * num_channels + channel
        at_k = k[:, None] * num_channels + channel
        if WITH_ATTRIBUTES:
            tl.atomic_add(by_attributes + at_i, u[:, None] * given, mask=mask, sem="relaxed")
            tl.atomic_add(by_attributes + at_j, v[:, None] * given, mask=mask, sem="relaxed")
            tl.atomic_add(by_attributes + at_k, t[:, None] * given, mask=mask, sem="relaxed")
        if WITH_BARYCENTRIC:
            c = tl.load(attributes + at_k, mask=mask, other=0.0)
            by_u += tl.sum(given * (tl.load(attributes + at_i, mask=mask, other=0.0) - c), axis=1)
            by_v += tl.sum(given * (tl.load(attributes + at_j, mask=mask, other=0.0) - c), axis=1)
        first += CHANNELS
    if WITH_BARYCENTRIC:
        tl.store(by_barycentric + pixel * 2, by_u, mask=pixel < num_pixels)
        tl.store(by_barycentric + pixel * 2 + 1, by_v, mask=pixel < num_pixels)


def shade(clip: Tensor, faces: Tensor, triangle: Tensor) -> tuple[Tensor, Tensor]:
    """Barycentric coordinates (B, H, W, 2) and depth (B, H, W) of visible triangles; differentiable once."""
    barycentric, depth = _Shade.apply(clip, faces, triangle)
    return barycentric, depth


def interpolate(attributes: Tensor, barycentric: Tensor, triangle: Tensor, corners: Tensor) -> Tensor:
    """Interpolate attributes (V, C) or (B, V, C) at every pixel, (B, H, W, C).

    ``corners`` (F, 3) holds the attribute row of each corner of each triangle. Differentiable once, in ``attributes``
    and ``barycentric``.
    """
    image: Tensor = _Interpolate.apply(attributes, barycentric, triangle, corners)
    return image


class _Shade(torch.autograd.Function):
    """Barycentric coordinates and depth as a function of clip positions, see ``fragments.shade_hits``."""

    @staticmethod
    def forward(ctx: Any, clip: Tensor, faces: Tensor, triangle: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        clip, faces, triangle = clip.contiguous(), faces.contiguous(), triangle.contiguous()
        ctx.save_for_backward(clip, faces, triangle)
        barycentric, depth = clip.new_empty(*triangle.shape, 2), clip.new_empty(triangle.shape)
        sizes = (triangle.numel(), clip.shape[1], *triangle.shape[1:])
        with torch.cuda.device_of(clip):
            _shade_kernel[_grid(triangle)](
                clip, faces, triangle, barycentric, depth, *sizes, PIXELS=_PIXELS, **OPTIONS
            )  # fmt: skip
        return barycentric, depth

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_barycentric: Tensor | None, by_depth: Tensor | None) -> tuple[Tensor | None, None, None]:
        clip, faces, triangle = ctx.saved_tensors
        if by_barycentric is None and by_depth is None:
            return None, None, None
        by_clip = torch.zeros_like(clip)
        upstream = [clip if given is None else given.contiguous() for given in (by_barycentric, by_depth)]
        sizes = (triangle.numel(), clip.shape[1], *triangle.shape[1:])
        with torch.cuda.device_of(clip):
            _shade_gradient_kernel[_grid(triangle)](
                clip, faces, triangle, *upstream, by_clip, *sizes, WITH_BARYCENTRIC=by_barycentric is not None,
                WITH_DEPTH=by_depth is not None, PIXELS=_PIXELS, **OPTIONS,
            )  # fmt: skip
        return by_clip, None, None


class _Interpolate(torch.autograd.Function):
    """Image as a function of attributes and barycentric coordinates, see ``rasterize.interpolate``."""

    @staticmethod
    def forward(ctx: Any, attributes: Tensor, barycentric: Tensor, triangle: Tensor, corners: Tensor) -> Tensor:
        attributes, barycentric = attributes.contiguous(), barycentric.contiguous()
        triangle, corners = triangle.contiguous(), corners.contiguous()
        ctx.save_for_backward(attributes, barycentric, triangle, corners)
        out = attributes.new_empty(*triangle.shape, attributes.shape[-1])
        with torch.cuda.device_of(out):
            _interpolate_kernel[_grid(triangle)](
                attributes, corners, barycentric, triangle, out, *_interpolation_sizes(attributes, triangle),
                CHANNELS=channels_per_program(out.shape[-1]), PIXELS=_PIXELS, **OPTIONS,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        attributes, barycentric, triangle, corners = ctx.saved_tensors
        upstream = upstream.contiguous()
        with_attributes, with_barycentric = ctx.needs_input_grad[:2]
        by_attributes = torch.zeros_like(attributes) if with_attributes else None
        by_barycentric = torch.empty_like(barycentric) if with_barycentric else None
        with torch.cuda.device_of(upstream):
            _interpolate_gradient_kernel[_grid(triangle)](
                attributes, corners, barycentric, triangle, upstream,
                attributes if by_attributes is None else by_attributes,
                barycentric if by_barycentric is None else by_barycentric,
                *_interpolation_sizes(attributes, triangle), WITH_ATTRIBUTES=with_attributes,
                WITH_BARYCENTRIC=with_barycentric, CHANNELS=channels_per_program(upstream.shape[-1]), PIXELS=_PIXELS,
                **OPTIONS,
            )  # fmt: skip
        return by_attributes, by_barycentric, None, None


def _grid(triangle: Tensor) -> tuple[int]:
    return (triton.cdiv(triangle.numel(), _PIXELS),)


def _interpolation_sizes(attributes: Tensor, triangle: Tensor) -> tuple[int, int, int, int]:
    """Number of pixels, attribute rows per image (0 if images share them), pixels per image, channels."""
    stride = attributes.shape[1] if attributes.ndim == 3 else 0
    return triangle.numel(), stride, triangle.shape[1] * triangle.shape[2], attributes.shape[-1]
