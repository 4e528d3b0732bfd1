"""3D Gaussians: the representation, its initialisation and its adaptive density control."""

from scoredist3d.geometry.gaussians.model import Gaussians

__all__ = ["Gaussians"]
