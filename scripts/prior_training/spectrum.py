"""Answer of an autoencoder to detail, by spatial frequency in cycles per pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BANDS: tuple[tuple[float, float], ...] = (
    (0.0, 0.06),
    (0.06, 0.12),
    (0.12, 0.18),
    (0.18, 0.25),
    (0.25, 0.35),
    (0.35, 0.5),
)


def band_noise(shape: Sequence[int], band: tuple[float, float], std: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise (B, C, H, W) whose spatial frequencies lie in ``band``, with standard deviation ``std``."""
    noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
    height, width = noise.shape[-2:]
    fy = torch.fft.fftfreq(height, device=noise.device)[:, None]
    fx = torch.fft.rfftfreq(width, device=noise.device)[None]
    radius = (fx * fx + fy * fy).sqrt()
    mask = (radius >= band[0]) & (radius < band[1])
    filtered = torch.fft.irfft2(torch.fft.rfft2(noise) * mask, s=(height, width))
    return std * filtered / filtered.square().mean((1, 2, 3), keepdim=True).sqrt()


@torch.no_grad()
def gains(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    images: Tensor,
    generator: torch.Generator,
    *,
    std: float = 0.02,
) -> dict[str, dict[str, float]]:
    """How much latents and reconstructions change when noise of one band is added to images.

    Args:
        encode, decode: Functions from images (B, 3, H, W) in [0, 1] to latents and back.
        images: (B, 3, H, W) in [0, 1].
        generator: Source of the noise.
        std: Standard deviation of the noise.

    Returns:
        For each band: ``latents``, the norm of the change of the latents per norm of the change of the image, and
        ``image``, the same of the reconstruction.
    """
    z = torch.cat([encode(chunk) for chunk in images.split(64)])
    restored = torch.cat([decode(chunk) for chunk in z.split(64)])
    result = {}
    for band in BANDS:
        noise = band_noise(images.shape, band, std, generator)
        moved = torch.cat([encode(chunk) for chunk in (images + noise).split(64)])
        output = torch.cat([decode(chunk) for chunk in moved.split(64)])
        norm = noise.flatten(1).norm(dim=1)
        result[f"{band[0]:g}-{band[1]:g}"] = {
            "latents": float(((moved - z).flatten(1).norm(dim=1) / norm).mean()),
            "image": float(((output - restored).flatten(1).norm(dim=1) / norm).mean()),
        }
    return result
