"""Random generators derived from the seed of the run, the name of a stream and the step.

Nothing in the package draws from torch's global stream. A new generator is derived for each use, so there is no state
to save: a resumed run equals the uninterrupted one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rng:
    """Source of generators; equal (seed, rank, stream, step) and device type give equal numbers.

    Attributes:
        seed: The run's seed.
        rank: Rank of the process in a distributed run; ranks draw different cameras and noise.
    """

    seed: int = 0
    rank: int = 0

    def __call__(self, stream: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator on ``device`` for one use, e.g. ``rng("noise", step, z.device)``."""
        key = f"{self.seed}/{self.rank}/{stream}/{step}".encode()
        derived = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") & (2**63 - 1)
        return torch.Generator(device=device).manual_seed(derived)

    def shared(self) -> Rng:
        """The source of rank 0, for draws that must be equal on all ranks, such as initial values."""
        return Rng(self.seed, 0)

    def derive(self, name: str) -> Rng:
        """An independent source of the same rank, e.g. for one of several scenes."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return Rng(int.from_bytes(digest, "little") & (2**63 - 1), self.rank)
