"""Regularisers: small terms on renders and geometry, each with its own weight."""

from scoredist3d.losses.base import Loss

__all__ = ["Loss"]
