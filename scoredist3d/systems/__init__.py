"""Systems combine cameras, representation, prior, guidance and losses into the loss of one training step."""

from scoredist3d.systems.base import System, TrainingStep

__all__ = ["System", "TrainingStep"]
