"""A run whose disk fills up says so in one sentence, keeps its checkpoints, and continues once there is space.

The disk is a small file system in memory, which only root can mount. A file takes its last bytes ahead of an
operation.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from shared.fault_cases import FaultCase

from scoredist3d import cli
from scoredist3d.export.video import VideoWriter, ffmpeg_available

Cases = Callable[..., FaultCase]
SIZE = 8 * 2**20
MOMENTS = {
    "code": ("/.code.tmp/custom", 0),
    "metrics": ("/.metrics.csv", 0),
    "preview": ("/images/.step-000002", 1),
    "checkpoint": ("/ckpts/.step-000002", 1),
    "video": (".videos.tmp/.turntable", 3),
    "cameras": ("turntable-cameras.json", 3),
    "export": (".glb", 3),
    "report": ("report.json", 3),
}
"""Part of the path whose operation finds the disk full, and the last step that is saved by then."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounts a small disk, which only root can do, on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("moment", "spare"), [*((moment, 0) for moment in MOMENTS), ("checkpoint", 16384)])
def test_a_full_disk_stops_a_run_that_continues_later(
    fault_case: Cases, small_disk: Path, moment: str, spare: int
) -> None:
    case, (text, saved) = fault_case("implicit-volume"), MOMENTS[moment]
    out = small_disk / "out"
    out.mkdir()
    outcome = case.command(out, fault="fill", disk=str(small_disk), text=text, spare=spare)
    assert outcome.code == cli.RUN_FAILED, outcome.text
    run = case.run_in(out)
    (error,) = [line for line in outcome.text.splitlines() if line.startswith("error: ")]
    again = f"continue with .+ --train --resume {run}" if saved else "start the command again"
    assert re.fullmatch(f"error: the disk of {run} is full; free some space, then {again}", error)
    assert outcome.text.endswith(f"{error}\n")
    assert case.whole.problems(run) == [] and case.whole.newest_steps(run) == {".": saved}
    (small_disk / "ballast").unlink()
    assert case.recover(out) == []


def test_a_full_disk_stops_a_pipeline_that_continues_later(fault_case: Cases, small_disk: Path) -> None:
    case, out = fault_case("pipeline"), small_disk / "out"
    out.mkdir()
    outcome = case.command(out, fault="fill", disk=str(small_disk), text="refine/ckpts/.step-000002", spare=0)
    run = case.run_in(out)
    assert outcome.code == cli.RUN_FAILED, outcome.text
    assert re.search(f"error: the disk of {run / 'refine'} is full; .* --train --resume {run}\n$", outcome.text), (
        outcome.text
    )
    assert case.whole.newest_steps(run) == {"coarse": 3, "refine": 1}
    (small_disk / "ballast").unlink()
    assert case.recover(out) == []


def test_a_full_disk_stops_an_export_that_keeps_the_earlier_one(fault_case: Cases, small_disk: Path) -> None:
    case, out = fault_case("implicit-volume"), small_disk / "out"
    out.mkdir()
    assert case.command(out).code == cli.OK
    run = case.run_in(out)
    export = ["--export", str(run), "--gpu", "cpu", "exporter.formats=[ply]"]
    fault = {"fault": "fill", "root": str(out), "disk": str(small_disk), "text": ".ply", "spare": 0}
    outcome = case.server.run(export, case.folder / "output.txt", **fault)
    assert outcome.code == cli.RUN_FAILED
    assert f"\nerror: the disk of {run} is full; free some space, then start the command again\n" in outcome.text
    assert case.whole.differences(run) == []


@pytest.mark.skipif(not ffmpeg_available(), reason="needs ffmpeg")
@pytest.mark.parametrize("spare", [0, 4096, 32768, 131072])
def test_an_mp4_that_does_not_fit_is_not_written(small_disk: Path, spare: int) -> None:
    with (small_disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE - spare)
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), dtype=np.uint8)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*video"),
        VideoWriter(small_disk / "video.mp4") as video,
    ):
        for frame in noise:
            video.add(frame)
    assert os.listdir(small_disk) == ["ballast"]
