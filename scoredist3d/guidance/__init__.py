"""Guidance: how a prior's prediction becomes a gradient. One file per method, on one base."""

from scoredist3d.guidance.core.base import Cost, Guidance, GuidanceOutput, Score
from scoredist3d.guidance.core.step import GuidanceStep

__all__ = ["Cost", "Guidance", "GuidanceOutput", "GuidanceStep", "Score"]
