"""Systems wire cameras, representation, prior, guidance and losses into one optimiser step; no maths lives here."""

from scoredist3d.systems.base import System, TrainingStep

__all__ = ["System", "TrainingStep"]
