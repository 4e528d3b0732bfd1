"""Folder of a run, ``<output_root>/<name>/<tag>@<YYYYmmdd-HHMMSS>/``, and the files in it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from scoredist3d.files import make_folder, sync_folder

LAST_CHECKPOINT = "last.ckpt"
RESOLVED_CONFIG = "resolved.yaml"
WRITTEN_CONFIG = "config.yaml"
PIPELINE_CONFIG = "pipeline.yaml"
SUMMARY = "summary.json"
_UNSAFE = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside the folder of one run; reading a property creates no file or folder."""

    root: Path

    @classmethod
    def create(cls, output_root: str | Path, name: str, tag: str, *, now: datetime | None = None) -> RunFolder:
        """Create the folder of a new run; runs created in the same second get the suffixes ``-2``, ``-3``, ..."""
        stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
        base = Path(output_root) / slug(name) / f"{slug(tag)}@{stamp}"
        make_folder(base.parent)
        for attempt in range(1, 1000):
            root = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
            with suppress(FileExistsError):
                root.mkdir()
                sync_folder(root.parent)
                return cls(root)
        raise ValueError(f"{base} and 998 folders with numbered suffixes already exist; choose another tag")

    @property
    def checkpoints(self) -> Path:
        """Folder of the numbered checkpoints and ``last.ckpt``."""
        return self.root / "ckpts"

    @property
    def last_checkpoint(self) -> Path:
        """Path of the newest checkpoint, ``last.ckpt``."""
        return self.checkpoints / LAST_CHECKPOINT

    @property
    def newest_checkpoint(self) -> Path | None:
        """``last.ckpt``; if the run was killed before it was first written, the newest numbered checkpoint, or None."""
        if self.last_checkpoint.is_file():
            return self.last_checkpoint
        return next(reversed(kept_checkpoints(self.checkpoints)), None)

    @property
    def images(self) -> Path:
        """Folder of the preview grids."""
        return self.root / "images"

    @property
    def videos(self) -> Path:
        """Folder of the final video."""
        return self.root / "videos"

    @property
    def export(self) -> Path:
        """Folder of the exported objects."""
        return self.root / "export"

    @property
    def code(self) -> Path:
        """Folder of the code snapshot."""
        return self.root / "code"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard event files."""
        return self.root / "tb"

    @property
    def metrics(self) -> Path:
        """File with the logged values, one row per logging window."""
        return self.root / "metrics.csv"

    @property
    def configs(self) -> Path:
        """Folder of the resolved config, the written config and the commands."""
        return self.root / "configs"

    @property
    def summary(self) -> Path:
        """File with the machine-readable summary of the run."""
        return self.root / SUMMARY

    @property
    def resolved_config(self) -> Path:
        """File with the complete config, from which the run can be repeated."""
        return self.configs / RESOLVED_CONFIG


def find_run(path: str | Path) -> tuple[RunFolder, Path]:
    """Run folder and checkpoint that belong to ``path``, a run folder or a checkpoint file inside a run folder.

    Raises:
        ValueError: The path does not exist, is not a run folder, or contains no checkpoint yet.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a run folder (<name>/<tag>@<time>) or a .ckpt file inside one")
    if path.is_file():
        # The checkpoint or its folder may be a link to another disk.
        folder = RunFolder(Path(os.path.abspath(path)).parent.parent)
        folder = folder if folder.resolved_config.is_file() else RunFolder(path.resolve().parent.parent)
        if path.suffix != ".ckpt" or not folder.resolved_config.is_file():
            raise ValueError(
                f"{path} is not a checkpoint inside a run folder; give a run folder or <run>/ckpts/{LAST_CHECKPOINT}"
            )
        return folder, path
    if (path / PIPELINE_CONFIG).is_file():
        stages = ", ".join(str(found.parent.parent) for found in sorted(path.glob(f"*/configs/{RESOLVED_CONFIG}")))
        raise ValueError(f"{path} is a pipeline; give one of its stages: {stages or '(no stage has started)'}")
    folder = RunFolder(path.parent if path.name == "ckpts" else path)
    if not folder.resolved_config.is_file():
        raise ValueError(
            f"{path} is not a run folder: it has no configs/{RESOLVED_CONFIG}; give a folder <name>/<tag>@<time>"
        )
    newest = folder.newest_checkpoint
    if newest is None:
        raise ValueError(f"{path} has no checkpoint yet (ckpts/{LAST_CHECKPOINT} is missing); train the run first")
    return folder, newest


def kept_checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.ckpt"), key=step_of)


def step_of(path: Path) -> int:
    """Step in the name of a numbered checkpoint or image, such as ``step-000200.png``; -1 if the name has none."""
    digits = path.stem.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def runs_below(path: Path) -> list[Path]:
    """Runs and stages of pipelines in the subfolders of ``path``, newest first; none if ``path`` is a run itself."""
    if (path / "configs" / RESOLVED_CONFIG).is_file():
        return []
    found = [file for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}/configs/{RESOLVED_CONFIG}")]
    return [file.parents[1] for file in sorted(found, key=lambda file: (file.stat().st_mtime, str(file)), reverse=True)]


def stages_begun(root: Path) -> dict[str, Path]:
    """Path of the resolved config of each pipeline stage that can be resumed, by stage name."""
    folders = {path.name: RunFolder(path) for path in root.iterdir() if path.is_dir()}
    return {
        name: folder.resolved_config
        for name, folder in folders.items()
        if folder.newest_checkpoint is not None and folder.resolved_config.is_file()
    }


def slug(text: str, *, limit: int = 60) -> str:
    """``text`` as one path component of letters, digits and ``_ . + -``; never empty."""
    return _UNSAFE.sub("-", text.strip()).strip("-.")[:limit].rstrip("-.") or "run"
