"""Regression of rendered normals and depths to those that a network estimates from target images."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.guidance.core.image_space import resized
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.procedural.surface_estimator import SurfaceEstimate, SurfaceEstimator, surface_difference


class SurfaceTerm:
    """Sum over the pixels of :func:`~scoredist3d.procedural.surface_estimator.surface_difference`.

    Args:
        estimator: ``embedded`` for the one in the package, or a folder written by
            scripts/train_surface_estimator.py.

    Raises:
        FieldError: The folder does not contain an estimator.
    """

    CHANNELS = 7
    """Channels of the map that :meth:`estimate` returns."""

    def __init__(self, estimator: str) -> None:
        self._network = Unregistered(SurfaceEstimator.named(estimator, "surface_estimator"))

    @torch.no_grad()
    def estimate(self, images: Tensor, backgrounds: Tensor, cameras: Cameras) -> Tensor:
        """Estimate of the surface in target images (B, H, W, 3), as one map (B, H, W, 7)."""
        network = self._network.value.to(images.device)
        found = network(images.float(), resized(backgrounds, images).float(), cameras)
        return found.packed().to(images)

    @staticmethod
    def gradients(
        surface: Tensor, normal: Tensor, depth: Tensor, opacity: Tensor, *, normal_weight: Tensor, depth_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the term with respect to the rendered normals (B, H, W, 3) and depths (B, H, W, 1).

        Args:
            surface: (B, h, w, 7), result of :meth:`estimate`.
            normal, depth, opacity: Maps of the render; their graph is not used.
            normal_weight, depth_weight: Weights lambda_n and lambda_d, which broadcast to (B, H, W).
        """
        target = SurfaceEstimate.unpacked(resized(surface, normal).to(normal))
        with torch.enable_grad():
            n, d = normal.detach().requires_grad_(), depth.detach().requires_grad_()
            weights = {"normal_weight": normal_weight, "depth_weight": depth_weight}
            loss = surface_difference(target, n, d, opacity.detach(), **weights).sum()
            by_normal, by_depth = torch.autograd.grad(loss, (n, d))
        return by_normal, by_depth
