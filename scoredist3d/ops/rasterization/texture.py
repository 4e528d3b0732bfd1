"""Differentiable texture sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.ops import backends
from scoredist3d.ops.gather import blend_rows

BACKENDS = ("torch", "native", "triton")
FILTERS = ("linear", "nearest")
WRAPS = ("repeat", "clamp")


def sample_texture(
    texture: Tensor, uv: Tensor, *, filter: str = "linear", wrap: str = "repeat", backend: str = "auto"
) -> Tensor:
    """Sample a texture at ``uv``; differentiable in the texture and, with linear filtering, in ``uv``.

    The texel in row i and column j of an Ht x Wt texture has its center at ``u = (j + 0.5) / Wt``,
    ``v = 1 - (i + 0.5) / Ht``: the origin is the bottom left corner, while row 0 is the top row.

    Args:
        texture: (Ht, Wt, C), or (B, Ht, Wt, C) with one texture for each ``uv[b]``.
        uv: (..., 2), or (B, ..., 2).
        filter: ``linear`` interpolates the four nearest texels, ``nearest`` takes the nearest one.
        wrap: Outside [0, 1], ``repeat`` tiles the texture and ``clamp`` extends its border.
        backend: auto, torch (differentiable to any order), native (CPU) or triton (CUDA; both differentiable once).

    Returns:
        (..., C).

    Raises:
        ValueError: A shape, ``filter`` or ``wrap`` is invalid, or the backend is not usable.
    """
    if filter not in FILTERS or wrap not in WRAPS:
        raise ValueError(
            f"sample_texture: filter must be one of {FILTERS} and wrap one of {WRAPS}, got {filter!r} and {wrap!r}"
        )
    if texture.ndim not in (3, 4) or (texture.ndim == 4 and (uv.ndim < 2 or uv.shape[0] != texture.shape[0])):
        shapes = f"{tuple(texture.shape)} and {tuple(uv.shape)}"
        raise ValueError(
            "sample_texture: texture and uv must be (Ht, Wt, C) and (..., 2), or both with a batch dimension, "
            f"got {shapes}"
        )
    if uv.shape[-1] != 2:
        raise ValueError(f"sample_texture: uv must be (..., 2), got {tuple(uv.shape)}")
    height, width, channels = texture.shape[-3:]
    flat = uv.reshape(-1, 2).to(texture.dtype)
    points = max(len(flat) // len(texture), 1) if texture.ndim == 4 else max(len(flat), 1)  # per texture
    name = backends.choose("texture lookup", backend, texture.device, BACKENDS, texture.dtype)
    if name == "triton":
        from scoredist3d.ops.rasterization import texture_triton

        values = texture_triton.sample(texture, flat, points, filter == "linear", wrap == "repeat")
        return values.reshape(*uv.shape[:-1], channels)
    index, weights = _texels(flat[:, 0] * width, (1 - flat[:, 1]) * height, height, width, filter, wrap)
    if texture.ndim == 4:
        image = torch.arange(len(flat), device=uv.device) // points
        index = index + (image * height * width)[:, None]
    return blend_rows(texture.reshape(-1, channels), index, weights, backend=name).reshape(*uv.shape[:-1], channels)


def _texels(x: Tensor, y: Tensor, height: int, width: int, filter: str, wrap: str) -> tuple[Tensor, Tensor]:
    """Texels (N, K) and their weights (N, K), for positions in texels from the top left corner."""
    if filter == "nearest":
        index = _wrap(y.floor().long(), height, wrap) * width + _wrap(x.floor().long(), width, wrap)
        return index[:, None], torch.ones_like(x)[:, None]
    x, y = x - 0.5, y - 0.5
    left, top = x.detach().floor(), y.detach().floor()
    across, down = x - left, y - top
    columns = [_wrap(left.long() + k, width, wrap) for k in (0, 1)]
    rows = [_wrap(top.long() + k, height, wrap) * width for k in (0, 1)]
    index = torch.stack([row + column for row in rows for column in columns], dim=1)
    weights = torch.stack([b * a for b in (1 - down, down) for a in (1 - across, across)], dim=1)
    return index, weights


def _wrap(index: Tensor, size: int, wrap: str) -> Tensor:
    return index.remainder(size) if wrap == "repeat" else index.clamp(0, size - 1)
