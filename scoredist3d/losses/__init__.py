"""Losses: weighted regularization terms on renders and geometry."""

from scoredist3d.losses.base import Loss

__all__ = ["Loss"]
