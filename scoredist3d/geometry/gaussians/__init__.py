"""3D Gaussians: parameters, initialization, adaptive density control, and the field used for export."""

from scoredist3d.geometry.gaussians.model import Gaussians

__all__ = ["Gaussians"]
