"""Renderers: render images of a representation from cameras."""

from scoredist3d.renderers.base import Render, Renderer

__all__ = ["Render", "Renderer"]
