"""Environment lighting: panoramas, and the split-sum approximation with prefiltered panoramas and a BRDF table.

A panorama is an equirectangular image (H, W, C) of all directions, with z up: row 0 is next to +z, the image center is
in direction +x, and the azimuth decreases to the right, as in a photograph: column u in [0, 1] has the azimuth
pi (1 - 2 u).

Split-sum approximation (Karis, "Real Shading in Unreal Engine 4", 2013; for its use in optimization see arXiv
2111.12503): the light reflected by a rough surface is the environment convolved with the GGX lobe around the mirror
direction, times the reflectance of the surface under uniform light. Convolution with a lobe that depends only on the
angle is a convolution along the rows of a panorama, so it needs one product per frequency and pair of rows. This is
differentiable, and fast enough to be repeated in every step of an optimization of the panorama.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

Profile = Callable[[Tensor], Tensor]
"""Weight of light as a function of the cosine of its angle to the center of a lobe; need not be normalized."""

_MAX_SUBDIVISION = 8


def texel_directions(height: int, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit directions (H, W, 3) of the texel centers of a panorama."""
    polar = (torch.arange(height, dtype=torch.float64) + 0.5) * (math.pi / height)
    azimuth = math.pi * (1.0 - 2.0 * (torch.arange(width, dtype=torch.float64) + 0.5) / width)
    flat = polar.sin()[:, None]
    x, y = flat * azimuth.cos(), flat * azimuth.sin()
    return torch.stack([x, y, polar.cos()[:, None].expand_as(x)], dim=-1).to(dtype)


def texel_solid_angles(height: int, width: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Solid angle (H, 1, 1) of a texel in each row, steradians; the sum over all texels is 4 pi."""
    edges = torch.cos(torch.arange(height + 1, dtype=torch.float64) * (math.pi / height))
    return ((edges[:-1] - edges[1:]) * (2.0 * math.pi / width)).to(dtype)[:, None, None]


def panorama_coordinates(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates u (column) and v (row) in [0, 1], both (...), of directions (..., 3) of any length.

    Gradients are finite everywhere: u has zero gradient at the poles, and a zero vector is treated as +z.
    """
    x, y, z = directions.unbind(-1)
    flat_squared = x * x + y * y
    nothing = flat_squared + z * z < 1e-12
    at_pole = (flat_squared < 1e-12) | nothing
    x, y = torch.where(at_pole, 1.0, x), torch.where(at_pole, 0.0, y)
    flat = torch.where(at_pole, 0.0, flat_squared.clamp_min(1e-12).sqrt())
    polar = torch.atan2(flat, torch.where(nothing, 1.0, z))
    return 0.5 - torch.atan2(y, x) / (2.0 * math.pi), polar / math.pi


def pad_panorama(panoramas: Tensor) -> Tensor:
    """Pad panoramas (..., H, W, C) by one texel to (..., H + 2, W + 2, C), for bilinear sampling across the borders.

    Columns wrap around. The rows beyond the poles are chosen such that the sample at a pole is the mean of the adjacent
    row, for any azimuth.
    """
    top, bottom = panoramas[..., :1, :, :], panoramas[..., -1:, :, :]
    above, below = (2.0 * row.mean(-2, keepdim=True) - row for row in (top, bottom))
    tall = torch.cat([above, panoramas, below], dim=-3)
    return torch.cat([tall[..., -1:, :], tall, tall[..., :1, :]], dim=-2)


def sample_panorama(panorama: Tensor, directions: Tensor) -> Tensor:
    """Bilinear samples (N, C) of a panorama (H, W, C) in directions (N, 3); differentiable in both."""
    return sample_padded(pad_panorama(panorama).movedim(-1, 0), directions)


def sample_padded(padded: Tensor, directions: Tensor) -> Tensor:
    """:func:`sample_panorama` for a panorama that is already padded and channels-first, (C, H + 2, W + 2)."""
    column, row = _grid_coordinates(directions, padded.shape[-2], padded.shape[-1])
    grid = torch.stack([column, row], dim=-1)[None, :, None]
    sampled = functional.grid_sample(padded[None], grid.to(padded.dtype), mode="bilinear", align_corners=True)
    return sampled[0, :, :, 0].T


def sample_padded_levels(padded: Tensor, directions: Tensor, level: Tensor) -> Tensor:
    """Samples (N, C) of a stack of padded panoramas, interpolated linearly within and between levels.

    Args:
        padded: (C, L, H + 2, W + 2).
        directions: (N, 3).
        level: (N,) in [0, 1], 0 for the first panorama and 1 for the last.
    """
    column, row = _grid_coordinates(directions, padded.shape[-2], padded.shape[-1])
    grid = torch.stack([column, row, 2.0 * level - 1.0], dim=-1)[None, :, None, None]
    sampled = functional.grid_sample(padded[None], grid.to(padded.dtype), mode="bilinear", align_corners=True)
    return sampled[0, :, :, 0, 0].T


def _grid_coordinates(directions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Columns and rows in a padded panorama, scaled to [-1, 1] from the first to the last texel center."""
    u, v = panorama_coordinates(directions)
    column, row = u * (columns - 2) + 0.5, v * (rows - 2) + 0.5
    return column * (2.0 / (columns - 1)) - 1.0, row * (2.0 / (rows - 1)) - 1.0


def resize_panorama(panorama: Tensor, height: int, width: int) -> Tensor:
    """Resize a panorama to (height, width, C): averages over solid angle when shrinking, otherwise bilinear samples."""
    if panorama.shape[0] < height or panorama.shape[1] < width:
        directions = texel_directions(height, width, dtype=panorama.dtype).to(panorama.device)
        return sample_panorama(panorama, directions.reshape(-1, 3)).view(height, width, -1)
    weight = texel_solid_angles(*panorama.shape[:2], dtype=panorama.dtype).to(panorama.device)
    weight = weight.expand(*panorama.shape[:2], 1)
    stacked = torch.cat([panorama * weight, weight], dim=-1).movedim(-1, 0)
    pooled = functional.adaptive_avg_pool2d(stacked[None], (height, width))[0].movedim(0, -1)
    return pooled[..., :-1] / pooled[..., -1:]


def ggx_profile(roughness: float) -> Profile:
    """GGX lobe D(n . h) G(n . l) with n = v = r and alpha = roughness^2.

    With this lobe, the split-sum approximation is exact at normal incidence for F_0 = 1. Karis uses n . l instead of
    Smith's G, which is similar for smooth surfaces.
    """
    alpha_squared = roughness**4

    def profile(cosine: Tensor) -> Tensor:
        half_squared = 0.5 * (1.0 + cosine)
        spread = half_squared * (alpha_squared - 1.0) + 1.0
        cosine = cosine.clamp_min(0.0)
        root = (alpha_squared + (1.0 - alpha_squared) * cosine.square()).sqrt()
        return 2.0 * cosine / (cosine + root) / spread.square()

    return profile


def glossy_directions(normals: Tensor, reflected: Tensor, roughness: Tensor) -> Tensor:
    """Dominant unit directions (N, 3) of the light that glossy surfaces reflect.

    The lobe of a rough surface is tilted from the mirror direction towards the normal, since grazing light is masked
    (Lagarde and de Rousiers, "Moving Frostbite to Physically Based Rendering", 2014, section 4.9.3).

    Args:
        normals: (N, 3), unit.
        reflected: (N, 3), unit, mirror directions of the view.
        roughness: (N,), perceptual roughness.
    """
    alpha = roughness.square()
    smooth = (1.0 - alpha).clamp_min(0.0)
    # The slope of the square root is infinite at 0, but the product is 0 there, so any small bound works.
    share = smooth * (smooth.clamp_min(1e-6).sqrt() + alpha)
    return functional.normalize(torch.lerp(normals, reflected, share[:, None]), dim=-1)


def cosine_profile(cosine: Tensor) -> Tensor:
    """Lambert lobe max(0, n . l); filtering with it gives the irradiance divided by pi."""
    return cosine.clamp_min(0.0)


def filter_spectrum(profile: Profile, height: int, width: int, feature: float) -> Tensor:
    """Filter matrices (W // 2 + 1, H, H) float32, indexed by frequency along the rows, result row and source row.

    The weight of a texel is the integral of the profile over it, computed by the midpoint rule on a grid that resolves
    ``feature`` (radians). The weights of a result texel sum to 1, so that uniform panoramas do not change.
    """
    subdivision = min(_MAX_SUBDIVISION, max(1, math.ceil(1.5 * math.pi / height / feature)))
    texel = math.pi / height
    centers = (torch.arange(height, dtype=torch.float64) + 0.5) * texel
    turns = torch.arange(width, dtype=torch.float64) * (2.0 * math.pi / width)
    weights = torch.zeros(height, height, width, dtype=torch.float64)
    offsets = [(index + 0.5) / subdivision - 0.5 for index in range(subdivision)]
    for down in offsets:
        polar = centers + down * texel
        rises = centers.cos()[:, None] * polar.cos()
        reach = centers.sin()[:, None] * polar.sin()
        for across in offsets:
            shift = (turns + across * (2.0 * math.pi / width)).cos()
            cosine = torch.addcmul(rises[..., None], reach[..., None], shift)
            weights += profile(cosine) * polar.sin()[None, :, None]
    weights /= weights.sum(dim=(1, 2), keepdim=True)
    # The weights are even functions of the azimuth difference, so their spectrum is real.
    return torch.fft.rfft(weights).real.permute(2, 0, 1).float().contiguous()


@dataclass(frozen=True)
class FilterBank:
    """Prefilters for panoramas of one size.

    Attributes:
        spectra: (W // 2 + 1, L H, H), GGX lobes of roughness l / (L - 1) for l = 1 .. L - 1, then the Lambert lobe.
        levels: L, number of roughness levels.
    """

    spectra: Tensor
    levels: int

    def __call__(self, panorama: Tensor) -> tuple[Tensor, Tensor]:
        """Prefiltered panoramas (L, H, W, C) and irradiance / pi (H, W, C) of a panorama (H, W, C).

        Level l has the roughness l / (L - 1); level 0 is the panorama itself.
        """
        height, width, channels = panorama.shape
        spectrum = torch.view_as_real(torch.fft.rfft(panorama, dim=1)).permute(1, 0, 2, 3).flatten(2)
        blurred = torch.bmm(self.spectra.to(panorama), spectrum)
        frequencies = blurred.view(-1, self.levels, height, channels, 2).permute(1, 2, 0, 3, 4).contiguous()
        results = torch.fft.irfft(torch.view_as_complex(frequencies), n=width, dim=2)
        return torch.cat([panorama[None], results[:-1]]), results[-1]


@lru_cache(maxsize=4)
def filter_bank(height: int, width: int, levels: int) -> FilterBank:
    """Prefilters for panoramas of this size, cached in memory; ``levels`` must be 2 or more."""
    spectra = []
    for level in range(1, levels):
        roughness = level / (levels - 1)
        spectra.append(filter_spectrum(ggx_profile(roughness), height, width, feature=roughness**2))
    spectra.append(filter_spectrum(cosine_profile, height, width, feature=0.1))
    return FilterBank(torch.cat(spectra, dim=1), levels)


def smith_lambda(cosine: Tensor, alpha: Tensor | float) -> Tensor:
    """Smith's Lambda for GGX: masking is 1 / (1 + Lambda), masking-shadowing is 1 / (1 + Lambda_v + Lambda_l)."""
    tangent_squared = (1.0 - cosine * cosine).clamp_min(0.0) / (cosine * cosine).clamp_min(1e-12)
    return 0.5 * ((1.0 + alpha * alpha * tangent_squared).sqrt() - 1.0)


@lru_cache(maxsize=2)
def brdf_table(size: int = 256, samples: int = 256) -> Tensor:
    """Split-sum BRDF table (2, size, size) float32: scale A and bias B of F_0 in the reflectance under uniform light.

    With Schlick's Fresnel term, F = F_0 (1 - c) + c with c = (1 - v . h)^5, the reflectance of a GGX surface is
    F_0 A + B. Row r has the roughness (r + 1/2) / size, column c has n . v = (c + 1/2) / size. Masking-shadowing is the
    height-correlated Smith term. Half vectors are sampled from the visible normals (Heitz, JCGT 2018) at the points of
    a Hammersley sequence.
    """
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    cosine, alpha = grid[None, :], grid.square()[:, None]
    sine = (1.0 - cosine * cosine).sqrt()
    # View direction, in the plane y = 0, after stretching the surface to roughness 1.
    length = (alpha * alpha * sine * sine + cosine * cosine).sqrt()
    view_x, view_z = alpha * sine / length, cosine / length
    lambda_view = smith_lambda(cosine, alpha)
    table = torch.zeros(2, size, size)
    for index in range(samples):
        radius, angle = math.sqrt((index + 0.5) / samples), 2.0 * math.pi * _radical_inverse(index)
        across, along = radius * math.cos(angle), radius * math.sin(angle)
        share = 0.5 * (1.0 + view_z)
        along_ = (1.0 - share) * math.sqrt(1.0 - across * across) + share * along
        up = (1.0 - across * across - along_ * along_).clamp_min(0.0).sqrt()
        half_x, half_y = alpha * (up * view_x - along_ * view_z), alpha * across
        half_z = (along_ * view_x + up * view_z).clamp_min(0.0)
        norm = (half_x * half_x + half_y * half_y + half_z * half_z).clamp_min(1e-24).sqrt()
        facing = ((sine * half_x + cosine * half_z) / norm).clamp(0.0, 1.0)
        light = 2.0 * facing * half_z / norm - cosine
        seen = (1.0 + lambda_view) / (1.0 + lambda_view + smith_lambda(light, alpha))
        seen = torch.where(light > 0.0, seen, 0.0)
        fresnel = (1.0 - facing).pow(5)
        table += torch.stack([(1.0 - fresnel) * seen, fresnel * seen])
    return table / samples


def sample_table(table: Tensor, cosine: Tensor, roughness: Tensor) -> tuple[Tensor, Tensor]:
    """A and B (N,) of :func:`brdf_table` at cosines and roughnesses (N,) in [0, 1]; differentiable in both."""
    grid = torch.stack([2.0 * cosine - 1.0, 2.0 * roughness - 1.0], dim=-1)[None, :, None]
    sampled = functional.grid_sample(table[None], grid.to(table.dtype), padding_mode="border", align_corners=False)
    return sampled[0, 0, :, 0], sampled[0, 1, :, 0]


def _radical_inverse(index: int) -> float:
    """Van der Corput sequence in base 2: the bits of ``index`` mirrored at the binary point."""
    result, weight = 0.0, 0.5
    while index:
        result += weight * (index & 1)
        index >>= 1
        weight *= 0.5
    return result
