"""Appearance of a radiance field as a camera in front of its surface sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.geometry.base import Field
from scoredist3d.materials.base import Material, ShadingInputs
from scoredist3d.meshes.exportable import SurfaceChannels

_SAMPLES = 12
_IN_FRONT, _BEHIND = 0.03, 0.12  # length of a ray on both sides of the surface, as fractions of the radius
_OPAQUE = 0.02  # transmittance at which a ray ends
_LEAST_OPACITY = 0.05  # of a ray whose average counts


@torch.no_grad()
def volume_channels(field: Field, material: Material, points: Tensor, normals: Tensor) -> SurfaceChannels:
    """Averages of the channels along short rays against the normals, weighted as in volume rendering.

    Training determines only averages along rays. The colors at single points of a radiance field vary far more than
    its renders, so a texture of single points is speckled.

    Args:
        field: The radiance field.
        material: Its material.
        points: (N, 3), on the surface, world.
        normals: (N, 3), outward unit normals there.
    """
    length = (_IN_FRONT + _BEHIND) * field.radius / _SAMPLES
    own = material.channels(ShadingInputs(field.features_at(points), points, normals))
    at_points, transmittance = _columns(own), points.new_ones(len(points))
    sums = torch.zeros_like(at_points)
    for index in range(_SAMPLES):
        rays = (transmittance > _OPAQUE).nonzero()[:, 0]
        if len(rays) == 0:
            break
        depth = (index + 0.5) * length - _IN_FRONT * field.radius
        where, facing = points[rays] - depth * normals[rays], normals[rays]
        output = field(where)
        passed = torch.exp(-output.density * length)
        found = _columns(material.channels(ShadingInputs(output.features, where, facing)))
        sums[rays] += (transmittance[rays] * (1.0 - passed))[:, None] * found
        transmittance[rays] *= passed
    opacity = (1.0 - transmittance)[:, None]
    return _split(torch.where(opacity > _LEAST_OPACITY, sums / opacity.clamp_min(_LEAST_OPACITY), at_points), own)


def _columns(channels: SurfaceChannels) -> Tensor:
    """(N, C): all channels that there are, side by side."""
    present = [values for values in vars(channels).values() if values is not None]
    return torch.cat([values if values.ndim == 2 else values[:, None] for values in present], dim=1)


def _split(columns: Tensor, like: SurfaceChannels) -> SurfaceChannels:
    """The inverse of :func:`_columns`, for channels that are present in ``like``; normals get unit length."""
    present = {name: values for name, values in vars(like).items() if values is not None}
    parts = columns.split([values.shape[1] if values.ndim == 2 else 1 for values in present.values()], dim=1)
    found = {name: part.reshape(values.shape) for (name, values), part in zip(present.items(), parts, strict=True)}
    if "normal" in found:
        found["normal"] = torch.nn.functional.normalize(found["normal"], dim=-1)
    return SurfaceChannels(**found)
