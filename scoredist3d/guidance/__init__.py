"""Guidance: how a prior's prediction becomes a gradient. One file per method, on one base."""

from scoredist3d.guidance.base import Guidance, GuidanceOutput, GuidanceStep, Score

__all__ = ["Guidance", "GuidanceOutput", "GuidanceStep", "Score"]
