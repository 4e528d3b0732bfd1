"""Code shared by the rasterization kernels in Triton."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

MAX_CHANNELS = 16  # channels that a program handles at once
# Contraction is disabled, so that results agree with the torch reference.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def channels_per_program(channels: int) -> int:
    """Block size along the channels: a power of two, at most MAX_CHANNELS."""
    return min(triton.next_power_of_2(max(channels, 1)), MAX_CHANNELS)


@triton.jit
def add_position_gradient(gradient, vertex, mask, x, y, by_x, by_y, by_w):
    """Add gradients of (X - x w, Y - y w, w) to the gradients of the clip positions (X, Y, Z, w) of vertices."""
    address = gradient + vertex * 4
    tl.atomic_add(address, by_x, mask=mask, sem="relaxed")
    tl.atomic_add(address + 1, by_y, mask=mask, sem="relaxed")
    tl.atomic_add(address + 3, by_w - x * by_x - y * by_y, mask=mask, sem="relaxed")
