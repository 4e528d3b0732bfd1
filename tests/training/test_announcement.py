"""Commands in messages: a path with spaces is quoted, so that the command can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from scoredist3d.training.announcement import after_failure, how_to_resume
from scoredist3d.training.folder import RunFolder


def test_paths_in_commands_are_quoted(tmp_path: Path) -> None:
    root = tmp_path / "my runs" / "a mug's $HOME"
    (root / "ckpts").mkdir(parents=True)
    (root / "ckpts" / "step-000001.ckpt").touch()
    folder = RunFolder(root)
    for message in (how_to_resume(folder, None), after_failure(folder, None, "once there is space")):
        assert shlex.split(message.partition(": ")[2])[-2:] == ["--resume", str(root)]
    assert shlex.split(how_to_resume(folder, root / "stage"))[-1] == str(root / "stage")
    assert how_to_resume(RunFolder(Path("outputs/mug/a@1")), None).endswith("--resume outputs/mug/a@1")
