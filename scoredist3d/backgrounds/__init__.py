"""Backgrounds: the colors behind the object."""

from scoredist3d.backgrounds.base import Background

__all__ = ["Background"]
