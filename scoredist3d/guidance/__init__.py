"""Guidance: how a prior's prediction becomes a gradient. One file per method, on one base."""

from scoredist3d.guidance.core.base import NFE, Guidance, GuidanceOutput, Score
from scoredist3d.guidance.core.context import StepContext

__all__ = ["NFE", "Guidance", "GuidanceOutput", "Score", "StepContext"]
