"""Guidance: distillation methods, which turn a prediction of the prior into a gradient. One file per method."""

from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.outputs import NFE, GuidanceOutput, Score

__all__ = ["NFE", "Guidance", "GuidanceOutput", "Score", "StepContext"]
