"""Lightning plugins for this program's checkpoint files and for the ranks that this program starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment

from scoredist3d.training.checkpoint import read_resumable, write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoint I/O by :mod:`scoredist3d.training.checkpoint`: writes atomically, reads without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint atomically."""
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint and place its tensors on the CPU."""
        return read_resumable(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint file."""
        Path(path).unlink(missing_ok=True)


class LocalRanks(ClusterEnvironment):
    """Cluster environment with one process per device of this machine; ``distributed.Workers`` starts the processes."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        super().__init__()
        self._rank, self._world_size, self._port = rank, world_size, port

    @property
    def creates_processes_externally(self) -> bool:
        """Always True, so that Lightning starts no processes."""
        return True

    @property
    def main_address(self) -> str:
        """Address of rank 0, which is on this machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """TCP port at which the ranks connect."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """Always False, so that Lightning does not select this environment automatically."""
        return False

    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Do nothing; the number of ranks is fixed at construction."""

    def global_rank(self) -> int:
        """Rank of this process among all processes."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing; the rank is fixed at construction."""

    def local_rank(self) -> int:
        """Rank of this process on this machine; equal to the global rank, because all ranks are on one machine."""
        return self._rank

    def node_rank(self) -> int:
        """Index of this machine; always 0, because a run uses one machine."""
        return 0
