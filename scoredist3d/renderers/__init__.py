"""Renderers: cameras and a representation, to images."""

from scoredist3d.renderers.base import Render, Renderer

__all__ = ["Render", "Renderer"]
