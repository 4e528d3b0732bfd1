"""Image-based lighting for physically based materials."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from scoredist3d.meshes.images import load_radiance
from scoredist3d.ops.shading.environment import (
    FilterBank,
    brdf_table,
    filter_bank,
    glossy_directions,
    pad_panorama,
    resize_panorama,
    sample_padded,
    sample_padded_levels,
    sample_table,
    texel_directions,
)

DIELECTRIC_F0 = 0.04
"""Reflectance of non-metals at normal incidence."""

_DARKEST = 1e-3  # smallest initial radiance of a learned map; its logarithm must be finite


def studio_panorama(height: int) -> Tensor:
    """(H, 2 H, 3) linear radiance of a bright studio with a sky-to-floor gradient, a key, a fill and a rim light.

    The irradiance divided by pi, which is the radiance of a white diffuse surface, lies between 0.25 and about 1.
    """
    directions = texel_directions(height, 2 * height)
    up = 0.5 + 0.5 * directions[..., 2:]
    radiance = 0.25 + 0.35 * up * up * torch.tensor([0.97, 1.0, 1.05])
    lights = (
        # azimuth and elevation (degrees), concentration, RGB radiance
        (35.0, 45.0, 24.0, (5.2, 5.0, 4.7)),
        (-60.0, 20.0, 12.0, (0.75, 0.8, 0.9)),
        (160.0, 35.0, 30.0, (2.0, 2.0, 2.1)),
    )
    for azimuth, elevation, concentration, color in lights:
        a, e = math.radians(azimuth), math.radians(elevation)
        axis = torch.tensor([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        lobe = (concentration * ((directions * axis).sum(-1, keepdim=True) - 1.0)).exp()
        radiance = radiance + lobe * torch.tensor(color)
    return radiance


class EnvironmentLight(nn.Module):
    """An environment map, prefiltered for diffuse and glossy reflection.

    The directions and filters are those of :mod:`scoredist3d.ops.shading.environment`. A learned map is stored as
    log-radiance and is prefiltered again at each call.
    """

    _specular: Tensor
    _irradiance: Tensor
    _spectra: Tensor
    _table: Tensor

    def __init__(self, panorama: Tensor, *, levels: int, learned: bool) -> None:
        """Args:
        panorama: (H, W, 3), linear radiance, >= 0.
        levels: Number of roughness values, evenly spaced in [0, 1], for which the map is prefiltered.
        learned: Whether the map is optimized.
        """
        super().__init__()
        self._levels = levels
        self._learned = learned
        self.register_buffer("_table", brdf_table().clone(), persistent=False)
        bank = filter_bank(panorama.shape[0], panorama.shape[1], levels)
        if learned:
            self.log_radiance = nn.Parameter(panorama.clamp_min(_DARKEST).log())
            self.register_buffer("_spectra", bank.spectra, persistent=False)
        else:
            specular, irradiance = _padded(bank(panorama))
            self.register_buffer("_specular", specular, persistent=False)
            self.register_buffer("_irradiance", irradiance, persistent=False)

    @staticmethod
    def read(path: str | None, height: int, *, key: str) -> Tensor:
        """(H, 2 H, 3) linear radiance of an image file; the built-in studio if ``path`` is None.

        Raises:
            ValueError: The file cannot be read.
        """
        if path is None:
            return studio_panorama(height)
        return resize_panorama(load_radiance(path, key=key), height, 2 * height)

    def diffuse(self, normals: Tensor) -> Tensor:
        """(N, 3) irradiance / pi at surfaces with (N, 3) unit normals."""
        return sample_padded(self._maps()[1], normals)

    def forward(self, normals: Tensor, reflected: Tensor, roughness: Tensor) -> tuple[Tensor, Tensor]:
        """Irradiance / pi and prefiltered glossy radiance, (N, 3) each, linear.

        Args:
            normals: (N, 3), unit.
            reflected: (N, 3), unit, the view direction mirrored at the surface.
            roughness: (N,), perceptual roughness in [0, 1].
        """
        specular, irradiance = self._maps()
        toward = glossy_directions(normals, reflected, roughness)
        return sample_padded(irradiance, normals), sample_padded_levels(specular, toward, roughness)

    def reflectance(self, cosine: Tensor, roughness: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) A and B of the specular reflectance F_0 A + B under uniform light."""
        return sample_table(self._table, cosine, roughness)

    def _maps(self) -> tuple[Tensor, Tensor]:
        """Padded glossy radiance (3, L, H + 2, W + 2) and irradiance / pi (3, H + 2, W + 2)."""
        if not self._learned:
            return self._specular, self._irradiance
        return _padded(FilterBank(self._spectra, self._levels)(self.log_radiance.exp()))


def _padded(maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Glossy radiance and irradiance, padded and channels-first."""
    specular, irradiance = (pad_panorama(part).movedim(-1, 0).contiguous() for part in maps)
    return specular, irradiance


def to_environment_frame(directions: Tensor, angle: Tensor | float) -> Tensor:
    """(N, 3) world directions in the frame of an environment rotated by ``angle`` (N,) radians about the z axis."""
    angle = torch.as_tensor(angle, dtype=directions.dtype, device=directions.device)
    cosine, sine = angle.cos(), angle.sin()
    x, y, z = directions.unbind(-1)
    return torch.stack([cosine * x + sine * y, cosine * y - sine * x, z], dim=-1)
