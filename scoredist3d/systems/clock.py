"""The step counts of a training run and of its scenes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Clock:
    """The current step, counted in two ways.

    A scene that was initialized from an earlier run has already been optimized for :attr:`offset` steps. The two
    counts have separate uses:

    - ``run_step`` is for everything that belongs to the run: learning rates, guidance, regularizers and their
      weights, the camera sampler, encoder noise, densification.
    - ``scene_step`` is for everything that belongs to the scene and must continue where the earlier run ended:
      renderers and their parts, e.g. the active levels of a hash grid, the occupancy grid, the slope of NeuS, random
      lights and backgrounds.

    Both counts are equal in a run that starts from scratch.

    Attributes:
        run_step: Number of optimizer steps of this run, from 0.
        offset: Number of optimizer steps of the scene before this run.
    """

    run_step: int = 0
    offset: int = 0

    @property
    def scene_step(self) -> int:
        """Number of optimizer steps of the scene, earlier runs included."""
        return self.offset + self.run_step

    def at(self, run_step: int) -> Clock:
        """The clock at another step of the same run."""
        return replace(self, run_step=run_step)
