"""Signals sent to ``--export``, ``--test`` and ``--validate``: they end soon, whatever they are doing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from shared.cli_runs import again, train, written
from shared.signalled_runs import command

from scoredist3d import cli

PRODUCTS = {"export": "export", "test": "videos", "validate": "images"}
"""Folder of the files that each command writes."""
HANGS = {
    "export": "from scoredist3d.training.replacement import Replacement as where; name = 'apply'",
    "test": "from scoredist3d.export.video import VideoWriter as where; name = 'add'",
    "validate": "from scoredist3d.training import outputs as where; name = 'preview_grid'",
}
"""Code that names a function of each command, in the middle of its work."""
IN_NATIVE_CODE = "import hashlib; hashlib.pbkdf2_hmac('sha512', b'', b'', 2**31 - 1)"  # hours in one call
IN_PYTHON = "import time; time.sleep(10**6)"
SIGNALS = {"export": (signal.SIGTERM, 143), "test": (signal.SIGINT, 130), "validate": (signal.SIGHUP, 129)}
MODES = ["export", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("test", "validate"))]


def files(run: Path) -> dict[str, bytes]:
    """Contents of all files of a run but the lock, which a process that ends at once leaves, and reports with times."""
    paths = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "report.json")]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def trained(folder: Path, mode: str) -> Path:
    """A run with products of an earlier call of the command."""
    _, run = train(written(folder), "trainer.max_steps=1", "trainer.grace_seconds=0.2")
    assert again(mode, run) == cli.OK
    return run


def hanging(mode: str, how: str) -> str:
    return f"{HANGS[mode]}\ndef hang(*_, **__):\n    print('hangs', flush=True)\n    {how}\nsetattr(where, name, hang)"


@pytest.mark.parametrize("mode", MODES)
def test_a_call_without_end_is_left_after_the_grace_period(tmp_path: Path, mode: str) -> None:
    run = trained(tmp_path, mode)
    before, (number, code) = files(run), SIGNALS[mode]
    arguments = [f"--{mode}", str(run), "--gpu", "cpu"]
    with command(tmp_path, arguments, prelude=hanging(mode, IN_NATIVE_CODE)) as stopped:
        stopped.wait_until(lambda: "hangs" in stopped.text, "hang")
        stopped.process.send_signal(number)
        assert stopped.end() == code
    text = stopped.text
    assert "Stopped 0.2 s after the signal (trainer.grace_seconds); the earlier files of the run are intact." in text
    after = files(run)
    assert {name: after[name] for name in before} == before
    assert {path.parts[0] for path in map(Path, after.keys() - before.keys())} <= {f".{PRODUCTS[mode]}.tmp"}
    assert again(mode, run) == cli.OK
    assert files(run).keys() == before.keys() and not (run / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", PRODUCTS)
def test_a_signal_ends_a_command_at_once(tmp_path: Path, mode: str) -> None:
    run = trained(tmp_path, mode)
    before, (number, code) = files(run), SIGNALS[mode]
    arguments = [f"--{mode}", str(run), "--gpu", "cpu", "trainer.grace_seconds=100000"]
    with command(tmp_path, arguments, prelude=hanging(mode, IN_PYTHON)) as stopped:
        stopped.wait_until(lambda: "hangs" in stopped.text, "hang")
        stopped.process.send_signal(number)
        assert stopped.end() == code
    assert "Traceback" not in stopped.text and "interrupted" in stopped.text
    assert files(run) == before and not (run / ".lock").exists()


@pytest.mark.slow
def test_a_second_signal_ends_a_command_in_any_call(tmp_path: Path) -> None:
    run = trained(tmp_path, "validate")
    arguments = ["--validate", str(run), "--gpu", "cpu", "trainer.grace_seconds=100000"]
    with command(tmp_path, arguments, prelude=hanging("validate", IN_NATIVE_CODE)) as stopped:
        stopped.wait_until(lambda: "hangs" in stopped.text, "hang")
        stopped.process.send_signal(signal.SIGTERM)
        stopped.process.send_signal(signal.SIGHUP)
        assert stopped.end() in (143, 129)  # Signals that wait at the same time have no order.
    assert "Stopped at once; the earlier files of the run are intact." in stopped.text
