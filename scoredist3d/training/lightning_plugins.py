"""Lightning plugins for this program's checkpoint files and for ranks that it starts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment

from scoredist3d.training.checkpoint import read_checkpoint, write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoint I/O with :mod:`scoredist3d.training.checkpoint`: atomic writing, reading without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint atomically."""
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint file."""
        Path(path).unlink(missing_ok=True)


class LocalRanks(ClusterEnvironment):
    """Cluster of one process per device of this machine, started by ``distributed.Workers``."""

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
        """Rank on this machine, which hosts all ranks."""
        return self._rank

    def node_rank(self) -> int:
        """Index of this machine, which is the only one."""
        return 0
