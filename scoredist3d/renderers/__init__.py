"""Renderers, which render images of a geometry and its material from cameras."""

from scoredist3d.renderers.base import Render, Renderer

__all__ = ["Render", "Renderer"]
