"""Renderers: cameras and a representation, to images."""

from scoredist3d.renderers.base import Render, Renderer, SampleRecord

__all__ = ["Render", "Renderer", "SampleRecord"]
