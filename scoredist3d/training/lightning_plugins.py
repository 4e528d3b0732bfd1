"""Lightning plugins: our checkpoint files, and ranks that this program starts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment

from scoredist3d.training.checkpoint import read_checkpoint, write_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through our atomic writer and our checked, code-free reader."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write atomically."""
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read to the CPU."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete."""
        Path(path).unlink(missing_ok=True)


class LocalRanks(ClusterEnvironment):
    """One process per device of this machine, started by :class:`scoredist3d.training.distributed.Workers`."""

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        super().__init__()
        self._rank, self._world_size, self._port = rank, world_size, port

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning must not start processes."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Where the ranks meet."""
        return self._port

    @staticmethod
    def detect() -> bool:
        """Never chosen by itself."""
        return False

    def world_size(self) -> int:
        """Number of ranks."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Fixed at construction."""

    def global_rank(self) -> int:
        """Rank of this process."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Fixed at construction."""

    def local_rank(self) -> int:
        """All ranks are on this machine."""
        return self._rank

    def node_rank(self) -> int:
        """The only machine."""
        return 0
