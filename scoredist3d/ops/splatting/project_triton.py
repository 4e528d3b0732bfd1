"""Projection of Gaussians in Triton, one kernel per pass: CUDA, float32 (also in Triton's interpreter, for the tests).

``torch_backend.project`` is the reference. The backward kernel recomputes the intermediate values from the inputs. Each
of its programs loops over the cameras for its Gaussians, which needs no atomics and gives bit-identical results.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoredist3d.ops.splatting.constants import FRUSTUM_MARGIN, REACH
from scoredist3d.ops.splatting.tiles_triton import launch
from scoredist3d.ops.splatting.types import ProjectedGaussians, ProjectionSettings

_BLOCK = 128  # Gaussians per program
_CONSTANTS = {"BLOCK": _BLOCK, "MARGIN": FRUSTUM_MARGIN}
_FORWARD = {**_CONSTANTS, "REACH": REACH}


@triton.jit
def _vector(source, index, mask):
    return (
        tl.load(source + index * 3, mask=mask, other=0.0),
        tl.load(source + index * 3 + 1, mask=mask, other=0.0),
        tl.load(source + index * 3 + 2, mask=mask, other=0.0),
    )


@triton.jit
def _store_vector(target, index, value, mask):
    tl.store(target + index * 3, value[0], mask=mask)
    tl.store(target + index * 3 + 1, value[1], mask=mask)
    tl.store(target + index * 3 + 2, value[2], mask=mask)


@triton.jit
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@triton.jit
def _scaled(factor, a):
    return factor * a[0], factor * a[1], factor * a[2]


@triton.jit
def _sum(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def _camera_rotation(w2c):
    """Rotation W of a camera as nine scalars, row by row."""
    return (
        tl.load(w2c), tl.load(w2c + 1), tl.load(w2c + 2),
        tl.load(w2c + 4), tl.load(w2c + 5), tl.load(w2c + 6),
        tl.load(w2c + 8), tl.load(w2c + 9), tl.load(w2c + 10),
    )  # fmt: skip


@triton.jit
def _rotate(m, v):
    """m v, for a matrix m given row by row."""
    return (
        m[0] * v[0] + m[1] * v[1] + m[2] * v[2],
        m[3] * v[0] + m[4] * v[1] + m[5] * v[2],
        m[6] * v[0] + m[7] * v[1] + m[8] * v[2],
    )


@triton.jit
def _rotate_transposed(m, v):
    """m^T v, for a matrix m given row by row."""
    return (
        m[0] * v[0] + m[3] * v[1] + m[6] * v[2],
        m[1] * v[0] + m[4] * v[1] + m[7] * v[2],
        m[2] * v[0] + m[5] * v[1] + m[8] * v[2],
    )


@triton.jit
def _quaternion(quaternions, index, mask):
    """Unit quaternion, its length before normalization, and the factor that normalized it."""
    w = tl.load(quaternions + index * 4, mask=mask, other=1.0)
    x = tl.load(quaternions + index * 4 + 1, mask=mask, other=0.0)
    y = tl.load(quaternions + index * 4 + 2, mask=mask, other=0.0)
    z = tl.load(quaternions + index * 4 + 3, mask=mask, other=0.0)
    length = tl.sqrt(w * w + x * x + y * y + z * z)
    factor = 1.0 / tl.maximum(length, 1e-12)
    return w * factor, x * factor, y * factor, z * factor, length, factor


@triton.jit
def _rotation(w, x, y, z):
    """Rotation matrix of a quaternion, row by row; its columns are the principal axes in the world."""
    return (
        1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y),
        2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x),
        2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y),
    )  # fmt: skip


@triton.jit
def _column(m, scale, K: tl.constexpr):
    return scale * m[K], scale * m[3 + K], scale * m[6 + K]


@triton.jit
def _slopes(rotation, w2c, mean, near):
    """Slopes x / depth and y / depth in the camera, safe divisor, depth, and whether it exceeds ``near``."""
    local = _rotate(rotation, mean)
    depth = -(local[2] + tl.load(w2c + 11))
    front = depth > near
    z = tl.where(front, depth, 1.0)
    return (local[0] + tl.load(w2c + 3)) / z, (local[1] + tl.load(w2c + 7)) / z, z, depth, front


@triton.jit
def _clamped(slope, limit):
    return tl.minimum(tl.maximum(slope, -limit), limit)


@triton.jit(do_not_specialize=["count"])
def _project_kernel(
    means, scales, quaternions, w2c, focal, means2d, conics, depths, radii, deviations, visible, compensation,
    count, width, height, near, dilation, BLOCK: tl.constexpr, MARGIN: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Project BLOCK Gaussians to one camera."""
    n, camera = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    mask, place = n < count, camera.to(tl.int64) * count + n
    w2c += camera * 16
    f, rotation = tl.load(focal + camera), _camera_rotation(w2c)
    w, x, y, z, _, _ = _quaternion(quaternions, n, mask)
    axes, scale = _rotation(w, x, y, z), _vector(scales, n, mask)
    slope_x, slope_y, z, depth, front = _slopes(rotation, w2c, _vector(means, n, mask), near)
    first, second = _rotate(rotation, _column(axes, scale[0], 0)), _rotate(rotation, _column(axes, scale[1], 1))
    third = _rotate(rotation, _column(axes, scale[2], 2))
    ahead = (first[2], second[2], third[2])
    to_x = _clamped(slope_x, MARGIN * 0.5 * width / f)
    to_y = _clamped(slope_y, MARGIN * 0.5 * height / f)
    p = _scaled(f / z, _sum((first[0], second[0], third[0]), _scaled(to_x, ahead)))
    q = _scaled(-f / z, _sum((first[1], second[1], third[1]), _scaled(to_y, ahead)))
    normal = _cross(p, q)
    xx, yy, xy = _dot(p, p), _dot(q, q), _dot(p, q)
    square = _dot(normal, normal)
    det = square + dilation * (xx + yy) + dilation * dilation
    xx, yy = xx + dilation, yy + dilation
    conic = (yy / det, -xy / det, xx / det)
    _store_vector(conics, place, conic, mask)
    u, v = f * slope_x + 0.5 * width, 0.5 * height - f * slope_y
    tl.store(means2d + place * 2, u, mask=mask)
    tl.store(means2d + place * 2 + 1, v, mask=mask)
    tl.store(depths + place, depth, mask=mask)
    if compensation is not None:
        tl.store(compensation + place, tl.sqrt(square) * tl.rsqrt(det), mask=mask)
    across, down = tl.sqrt(xx), tl.sqrt(yy)
    half = 0.5 * (xx - yy)
    longest = tl.sqrt(0.5 * (xx + yy) + tl.sqrt(half * half + xy * xy))
    # Comparisons with NaN are false, so non-finite Gaussians are invisible.
    seen = front & (u + REACH * across > 0.0) & (u - REACH * across < width)
    seen = seen & (v + REACH * down > 0.0) & (v - REACH * down < height)
    for k in tl.static_range(3):
        seen = seen & (tl.abs(conic[k]) < float("inf"))
    tl.store(deviations + place * 2, across, mask=mask)
    tl.store(deviations + place * 2 + 1, down, mask=mask)
    tl.store(radii + place, tl.where(seen, REACH * longest, 0.0), mask=mask)
    tl.store(visible + place, seen, mask=mask)


@triton.jit
def _rows_gradient(p, q, of_xx, of_xy, of_yy, of_area, dilation):
    """Gradient of the rows p, q of J W A, from the gradients of conic and compensation |p x q| / sqrt(det)."""
    normal = _cross(p, q)
    square = _dot(normal, normal)
    xx, yy, xy = _dot(p, p) + dilation, _dot(q, q) + dilation, _dot(p, q)
    det = square + dilation * (xx + yy) - dilation * dilation
    area, root = tl.sqrt(square), tl.rsqrt(det)
    by_det = -(of_xx * yy - of_xy * xy + of_yy * xx) / det - 0.5 * of_area * area * root
    by_det = by_det / det
    by_xx, by_yy, by_xy = of_yy / det + dilation * by_det, of_xx / det + dilation * by_det, -of_xy / det
    # The norm is not differentiable at 0; its gradient is set to 0 there.
    by_normal = _scaled(
        2.0 * by_det + tl.where(area > 0.0, of_area * root, 0.0) / tl.where(area > 0.0, area, 1.0), normal
    )
    by_p = _sum(_cross(q, by_normal), _sum(_scaled(2.0 * by_xx, p), _scaled(by_xy, q)))
    by_q = _sum(_cross(by_normal, p), _sum(_scaled(2.0 * by_yy, q), _scaled(by_xy, p)))
    return by_p[0], by_p[1], by_p[2], by_q[0], by_q[1], by_q[2]


@triton.jit
def _quaternion_gradient(w, x, y, z, length, factor, m):
    """Gradient of the quaternion before normalization, from the gradient m of the rotation matrix, row by row."""
    by_w = 2.0 * (z * (m[3] - m[1]) + y * (m[2] - m[6]) + x * (m[7] - m[5]))
    by_x = 2.0 * (y * (m[1] + m[3]) + z * (m[2] + m[6]) + w * (m[7] - m[5]) - 2.0 * x * (m[4] + m[8]))
    by_y = 2.0 * (x * (m[1] + m[3]) + z * (m[5] + m[7]) + w * (m[2] - m[6]) - 2.0 * y * (m[0] + m[8]))
    by_z = 2.0 * (x * (m[2] + m[6]) + y * (m[5] + m[7]) + w * (m[3] - m[1]) - 2.0 * z * (m[0] + m[4]))
    along = tl.where(length > 1e-12, w * by_w + x * by_x + y * by_y + z * by_z, 0.0)
    return (
        (by_w - along * w) * factor,
        (by_x - along * x) * factor,
        (by_y - along * y) * factor,
        (by_z - along * z) * factor,
    )


@triton.jit(do_not_specialize=["count"])
def _project_gradient_kernel(
    means, scales, quaternions, w2c, focal, of_means2d, of_conics, of_depths, of_compensation,
    by_means, by_scales, by_quaternions, count, batch, width, height, near, dilation,
    BLOCK: tl.constexpr, MARGIN: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK Gaussians, summed over all cameras."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    mean, scale = _vector(means, n, mask), _vector(scales, n, mask)
    qw, qx, qy, qz, length, factor = _quaternion(quaternions, n, mask)
    axes = _rotation(qw, qx, qy, qz)
    none = tl.zeros((BLOCK,), dtype=tl.float32)
    by_mean, by_first, by_second, by_third = (
        (none, none, none),
        (none, none, none),
        (none, none, none),
        (none, none, none),
    )
    camera = 0
    while camera < batch:
        place = n.to(tl.int64) + camera * count
        f, rotation = tl.load(focal + camera), _camera_rotation(w2c)
        slope_x, slope_y, z, _, front = _slopes(rotation, w2c, mean, near)
        first, second = _rotate(rotation, _column(axes, scale[0], 0)), _rotate(rotation, _column(axes, scale[1], 1))
        third = _rotate(rotation, _column(axes, scale[2], 2))
        ahead = (first[2], second[2], third[2])
        limit_x, limit_y = MARGIN * 0.5 * width / f, MARGIN * 0.5 * height / f
        to_x, to_y, size = _clamped(slope_x, limit_x), _clamped(slope_y, limit_y), f / z
        p = _scaled(size, _sum((first[0], second[0], third[0]), _scaled(to_x, ahead)))
        q = _scaled(-size, _sum((first[1], second[1], third[1]), _scaled(to_y, ahead)))
        of_conic = _vector(of_conics, place, mask)
        of_area = none
        if of_compensation is not None:
            of_area = tl.load(of_compensation + place, mask=mask, other=0.0)
        by_rows = _rows_gradient(p, q, of_conic[0], of_conic[1], of_conic[2], of_area, dilation)
        by_p, by_q = (by_rows[0], by_rows[1], by_rows[2]), (by_rows[3], by_rows[4], by_rows[5])
        # p and q are the axes in camera space times f / z; these are the gradients of the axes.
        by_x, by_y = _scaled(size, by_p), _scaled(-size, by_q)
        by_ahead = _sum(_scaled(to_x, by_x), _scaled(to_y, by_y))
        inside_x, inside_y = tl.abs(slope_x) <= limit_x, tl.abs(slope_y) <= limit_y
        by_slope_x = f * tl.load(of_means2d + place * 2, mask=mask, other=0.0)
        by_slope_x += tl.where(inside_x, _dot(by_x, ahead), 0.0)
        by_slope_y = -f * tl.load(of_means2d + place * 2 + 1, mask=mask, other=0.0)
        by_slope_y += tl.where(inside_y, _dot(by_y, ahead), 0.0)
        by_z = -(_dot(by_p, p) + _dot(by_q, q) + by_slope_x * slope_x + by_slope_y * slope_y) / z
        by_depth = tl.load(of_depths + place, mask=mask, other=0.0) + tl.where(front, by_z, 0.0)
        by_mean = _sum(by_mean, _rotate_transposed(rotation, (by_slope_x / z, by_slope_y / z, -by_depth)))
        by_first = _sum(by_first, _rotate_transposed(rotation, (by_x[0], by_y[0], by_ahead[0])))
        by_second = _sum(by_second, _rotate_transposed(rotation, (by_x[1], by_y[1], by_ahead[1])))
        by_third = _sum(by_third, _rotate_transposed(rotation, (by_x[2], by_y[2], by_ahead[2])))
        w2c += 16
        camera += 1
    _store_vector(by_means, n, by_mean, mask)
    by_scale = (_dot(by_first, _column(axes, 1.0, 0)), _dot(by_second, _column(axes, 1.0, 1)))
    _store_vector(by_scales, n, (by_scale[0], by_scale[1], _dot(by_third, _column(axes, 1.0, 2))), mask)
    a, b, c = _scaled(scale[0], by_first), _scaled(scale[1], by_second), _scaled(scale[2], by_third)
    by_axes = (a[0], b[0], c[0], a[1], b[1], c[1], a[2], b[2], c[2])
    by_quaternion = _quaternion_gradient(qw, qx, qy, qz, length, factor, by_axes)
    for k in tl.static_range(4):
        tl.store(by_quaternions + n * 4 + k, by_quaternion[k], mask=mask)


def project(
    means: Tensor, scales: Tensor, quaternions: Tensor, w2c: Tensor, focal: Tensor, settings: ProjectionSettings
) -> ProjectedGaussians:
    """Project Gaussians to the image planes; differentiable once, in means, scales and quaternions."""
    return ProjectedGaussians(*_Project.apply(means, scales, quaternions, w2c, focal, settings))


def _numbers(settings: ProjectionSettings) -> tuple[float, ...]:
    """Image size and projection parameters, the scalar arguments that come last in both kernels."""
    return float(settings.width), float(settings.height), settings.near, settings.dilation


class _Project(torch.autograd.Function):
    """Autograd function that computes the fields of :class:`ProjectedGaussians`.

    ``means2d``, ``conics``, ``depth`` and ``compensation`` are differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        scales: Tensor,
        quaternions: Tensor,
        w2c: Tensor,
        focal: Tensor,
        settings: ProjectionSettings,
    ) -> tuple[Tensor | None, ...]:
        inputs = tuple(tensor.contiguous() for tensor in (means, scales, quaternions, w2c, focal))
        batch, count = len(w2c), len(means)
        means2d, deviations = means.new_empty(batch, count, 2), means.new_empty(batch, count, 2)
        conics, depth = means.new_empty(batch, count, 3), means.new_empty(batch, count)
        radius, visible = torch.empty_like(depth), torch.empty_like(depth, dtype=torch.bool)
        compensation = torch.empty_like(depth) if settings.antialiased else None
        outputs = (means2d, conics, depth, radius, deviations, visible, compensation)
        grid = (triton.cdiv(count, _BLOCK), batch)
        launch(_project_kernel, grid, (*inputs, *outputs, count, *_numbers(settings)), _FORWARD)
        ctx.save_for_backward(*inputs)
        ctx.settings = settings
        ctx.mark_non_differentiable(radius, deviations, visible)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        means, scales, quaternions, w2c, _ = ctx.saved_tensors
        batch, count = len(w2c), len(means)
        shapes = ((batch, count, 2), (batch, count, 3), (batch, count))
        given = [
            means.new_zeros(shape) if tensor is None else tensor.contiguous()
            for tensor, shape in zip(upstream[:3], shapes, strict=True)
        ]
        of_compensation = None if upstream[-1] is None else upstream[-1].contiguous()
        found = (torch.empty_like(means), torch.empty_like(scales), torch.empty_like(quaternions))
        arguments = (*ctx.saved_tensors, *given, of_compensation, *found, count, batch, *_numbers(ctx.settings))
        launch(_project_gradient_kernel, (triton.cdiv(count, _BLOCK),), arguments, _CONSTANTS)
        return *found, None, None, None
