"""Regression of rendered normals and depths to those that a network estimates from a target image (MonoSDF)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.config import FieldError
from scoredist3d.guidance.core.image_space import resized
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.procedural.surface_estimator import SurfaceEstimate, SurfaceEstimator

_COVERED = 0.9  # opacity above which both surfaces are compared


class SurfaceTerm:
    """Loss on normals N and depths D (arXiv 2206.00665): the sum of their differences from the estimates N' and D'.

    lambda_n (||N - N'||_1 + 1 - <N, N'>) / b_n + lambda_d |D - D'| / b_d over the pixels that the object covers in the
    render and in the target image. The division by the expected errors b, which the network estimates as well, is not
    in the paper. The authors' depth term has an unknown scale and offset for every image; the estimator used here knows
    the camera, so its depths are compared directly.

    Args:
        estimator: ``embedded`` for the one in the package, or a folder written by
            scripts/train_surface_estimator.py.

    Raises:
        FieldError: The folder does not contain an estimator.
    """

    CHANNELS = 7
    """Channels of the map that :meth:`estimate` returns."""

    def __init__(self, estimator: str) -> None:
        folder = None if estimator == "embedded" else Path(estimator)
        try:
            self._network = Unregistered(SurfaceEstimator.load(folder))
        except FileNotFoundError as error:
            raise FieldError(str(error), "surface_estimator") from error
        except (TypeError, RuntimeError) as error:
            message = f"the network in {estimator} is not a surface estimator: {error}"
            raise FieldError(message, "surface_estimator") from error

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
        """Gradients of the loss with respect to the rendered normals (B, H, W, 3) and depths (B, H, W, 1).

        Args:
            surface: (B, h, w, 7), result of :meth:`estimate`.
            normal, depth, opacity: Maps of the render; their graph is not used.
            normal_weight, depth_weight: Weights lambda_n and lambda_d, which broadcast to (B, H, W).
        """
        target = SurfaceEstimate.unpacked(resized(surface, normal).to(normal))
        covered = ((target.opacity > _COVERED) & (opacity > _COVERED)).to(normal)[..., 0]
        with torch.enable_grad():
            n, d = normal.detach().requires_grad_(), depth.detach().requires_grad_()
            angles = (n - target.normal).abs().sum(-1) + 1.0 - (n * target.normal).sum(-1)
            distances = (d - target.depth)[..., 0].abs()
            angles, distances = angles / target.normal_error[..., 0], distances / target.depth_error[..., 0]
            loss = (covered * (normal_weight * angles + depth_weight * distances)).sum()
            by_normal, by_depth = torch.autograd.grad(loss, (n, d))
        return by_normal, by_depth
