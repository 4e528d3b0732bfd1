"""Space carving with uncertain depths: removal of matter through which several views see (Kutulakos and Seitz 2000).

Gradients of renders move a surface by a few grid cells, which does not dig a cavity such as the inside of a mug.
Depths that are estimated from images say at once which space in front of the visible surface is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.cameras import Cameras
from scoredist3d.meshes.tsdf_fusion import seen_pixels

_COVERED = 0.9  # opacity above which a pixel shows the object
_MARGIN, _TRUNCATION = 2.0, 3.0  # grid cells
_LEAST_VIEWS = 4  # that see through a point
_RATIO = 3.0  # of the views that see through a point to those that see a surface there
_LEAST_POINTS = 27  # of a connected region that is removed; smaller ones are errors of the depths
_BAND = 3  # grid cells around removed points whose distances are those of the views as well; reaches across the margin


@dataclass(frozen=True)
class DepthEstimates:
    """Estimated depths of an object in ``B`` views.

    Attributes:
        cameras: The B cameras, with the size of the maps.
        depth: (B, H, W), distance along the ray from the camera, scene units.
        error: (B, H, W), expected absolute error of the depth, scene units, positive.
        opacity: (B, H, W), probability that the pixel shows the object.
    """

    cameras: Cameras
    depth: Tensor
    error: Tensor
    opacity: Tensor


def carving_evidence(points: Tensor, views: DepthEstimates, cell: float) -> Tensor:
    """What views know about points; the evidence of several sets of views adds up.

    Args:
        points: (P, 3), world.
        views: Depths of the object.
        cell: Spacing of the grid, scene units.

    Returns:
        (4, P): the number of views that see through the point; of those that see the surface there; the weighted sum
        of truncated signed distances (Curless and Levoy 1996); the sum of the weights.
    """
    evidence = points.new_zeros(4, len(points))
    cosines = views.cameras.rays().cosines
    for index in range(len(views.cameras)):
        pixel, in_image, z, along_ray = seen_pixels(points, views.cameras[index])
        depth, error = ((maps[index] * cosines[index]).flatten()[pixel] for maps in (views.depth, views.error))
        known = in_image & (views.opacity[index].flatten()[pixel] > _COVERED)
        distance, error = (depth + z) * along_ray, error * along_ray
        margin = _MARGIN * cell + error
        truncation = _TRUNCATION * cell
        weight = torch.where(known & (distance > -truncation), 1.0 / error, 0.0)
        evidence[0] += known & (distance > margin)
        evidence[1] += known & (distance.abs() <= margin)
        evidence[2] += weight * distance.clamp(-truncation, truncation)
        evidence[3] += weight
    return evidence


def carved(distances: Tensor, evidence: Tensor, cell: float) -> Tensor:
    """Signed distances on a lattice without the matter through which views see; matter is never added.

    A point is removed if at least 4 views see through it, three times as many as see a surface there, and if it belongs
    to a connected region of at least 27 such points. Within three cells of removed points, the distances are at least
    those fused from the views, so the new surface is as smooth as the mean of their depths.

    Args:
        distances: (N, N, N), negative inside, scene units; infinite where the lattice has no point.
        evidence: (4, N, N, N); see :func:`carving_evidence`.
        cell: Spacing of the lattice, scene units.
    """
    through, at_surface, total, weight = evidence
    fused = torch.where(weight > 0, total / weight.clamp_min(1e-12), -_TRUNCATION * cell)
    removed = (distances < 0) & (through >= _LEAST_VIEWS) & (through >= _RATIO * at_surface)
    removed = _large_regions(removed)
    side = 2 * _BAND + 1
    band = F.max_pool3d(removed[None, None].to(distances), side, stride=1, padding=_BAND)[0, 0] > 0
    # Removed points stay outside, also where the mean distance of all views is close to 0.
    least = torch.where(removed, fused.clamp_min(0.5 * cell), fused)
    return torch.where(band, torch.maximum(distances, least), distances)


def _large_regions(mask: Tensor) -> Tensor:
    """The points of a mask (N, N, N) whose connected regions are large enough; neighbors share a corner."""
    from scipy import ndimage

    labels, count = ndimage.label(mask.cpu().numpy(), np.ones((3, 3, 3)))
    large = np.bincount(labels.ravel(), minlength=count + 1) >= _LEAST_POINTS
    large[0] = False
    return torch.from_numpy(large[labels]).to(mask.device)
