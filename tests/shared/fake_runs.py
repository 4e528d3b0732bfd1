"""Stand-ins for runs, to test the command line."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any


class FakeRuns:
    """Stands in for ``scoredist3d.training.run`` and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.outcome: Any = types.SimpleNamespace(interrupted=False, error=None)
        for name in ("run_training", "run_validation", "run_test", "run_export"):
            setattr(self, name, self.recorder(name))

    def recorder(self, name: str) -> Any:
        def record(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return self.outcome

        return record


def make_run(folder: Path, *, time: int = 0, steps: int = 7) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "ckpts").mkdir()
    (folder / "ckpts" / "last.ckpt").write_bytes(b"state")
    resolved = folder / "configs" / "resolved.yaml"
    resolved.write_text(f"prompt: a mug\nname: {folder.parent.name}\ntrainer: {{max_steps: {steps}}}\n")
    os.utime(resolved, (1_700_000_000 + time,) * 2)
    return folder
