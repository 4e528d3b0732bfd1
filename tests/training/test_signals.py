"""Signals sent to runs on one and on several devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from shared.signalled_runs import HANG, RunningCommand, training

from scoredist3d.signals import SignalReceived
from scoredist3d.training.checkpoint import checkpoint_step
from scoredist3d.training.distributed import _Ended
from scoredist3d.training.interrupt import InterruptGuard
from scoredist3d.training.slurm import requeue_job

LONG_OPERATOR = "import hashlib; hashlib.pbkdf2_hmac('sha512', b'', b'', 2**31 - 1)"  # hours in one call


def guarded(body: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``body`` in a process, inside of a guard that prints its messages."""
    lines = [
        "import os, signal, threading, time; from scoredist3d.training.interrupt import InterruptGuard",
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)",  # ignored where the tests run under nohup
        f"with InterruptGuard(lambda text: print(text, flush=True), **{options!r}) as guard:",
        *(f"    {line}" for line in body.splitlines()),
        "print('not reached')",
    ]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=HANG, check=False
    )


def later(*numbers: int) -> str:
    """Code that sends signals to its own process soon, from another thread."""
    sends = "; ".join(f"os.kill(os.getpid(), {int(number)}); time.sleep(0.1)" for number in numbers)
    return f"threading.Thread(target=lambda: exec('time.sleep(0.1); {sends}'), daemon=True).start()"


def test_the_grace_period_ends_a_step_of_any_length() -> None:
    body = f"guard.graceful = True\nguard.before_forced_end = lambda: print('last actions', flush=True)\n{later(15)}\n"
    done = guarded(body + LONG_OPERATOR, grace_seconds=0.2)
    assert done.returncode == 143 and "not reached" not in done.stdout
    assert "Stopped 0.2 s after the signal" in done.stdout and "last actions" in done.stdout


def test_a_second_signal_ends_a_step_of_any_length() -> None:
    done = guarded(f"guard.graceful = True\n{later(signal.SIGTERM, signal.SIGHUP)}\n{LONG_OPERATOR}")
    assert done.returncode == 143 and "Stopped at once; the last saved checkpoint is intact" in done.stdout


def test_a_stop_in_another_rank_starts_the_grace_period() -> None:
    done = guarded(f"guard.graceful = True\nguard.agree(signal.SIGHUP)\n{LONG_OPERATOR}", grace_seconds=0.1)
    assert done.returncode == 129


def test_a_request_to_save_does_not_stop() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGUSR1)
    with InterruptGuard(said.append) as guard:
        guard.on_save_outside_training = lambda: said.append("nothing to save")
        signal.raise_signal(signal.SIGUSR1)
        deadline = time.monotonic() + HANG
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        guard.graceful = True
        signal.raise_signal(signal.SIGUSR1)
        assert guard.save_requested and not guard.requested
    assert said == ["nothing to save"] and signal.getsignal(signal.SIGUSR1) is before


def test_an_ignored_hang_up_stays_ignored() -> None:
    """``nohup`` ignores the signal, and the run goes on after the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptGuard(lambda _: None) as guard:
            signal.raise_signal(signal.SIGHUP)
            assert not guard.requested
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with InterruptGuard(lambda _: None) as guard, pytest.raises(SignalReceived, match="SIGHUP"):
            signal.raise_signal(signal.SIGHUP)
        assert guard.exit_code == 129
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_starts_ignores_requests_to_save() -> None:
    """SLURM may send them to every process of a job."""
    script = """
import os, signal, sys
from scoredist3d.training import worker
def _train(options, text):
    os.kill(os.getpid(), signal.SIGUSR1)
    return 7
worker._train = _train
sys.argv += ["run", "--rank", "1", "--devices", "cpu:2", "--port", "1", "--parent", "1"]
sys.exit(worker.main())
"""
    assert subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, check=False).returncode == 7


def test_slurm_jobs_are_requeued_with_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert requeue_job() is None  # there is no scontrol
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    program.chmod(0o755)
    assert (requeue_job() or "").startswith("SLURM job 17 is requeued")
    assert (tmp_path / "called").read_text() == "requeue 17\n"
    program.write_text("#!/bin/sh\necho 'not permitted' >&2\nexit 1\n")
    assert requeue_job() == "warning: SLURM job 17 was not requeued: not permitted"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue_job() is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-9, "rank 1 (process 5) was killed by SIGKILL"),
        (-11, "rank 1 (process 5) was killed by SIGSEGV"),
        (-35, "rank 1 (process 5) was killed by signal 35"),  # one without a name
        (143, "rank 1 (process 5) was stopped by SIGTERM"),
        (-15, "rank 1 (process 5) was stopped by SIGTERM"),
        (1, "rank 1 failed with exit code 1"),
    ],
)
def test_the_end_of_a_worker_is_described(code: int, message: str) -> None:
    assert _Ended(1, 5, code).describe().startswith(message)


# Whole runs


def saved_once(run: RunningCommand) -> None:
    """Check that a stopped run has one complete checkpoint of its last step, and says so."""
    summary = json.loads((run.folder / "summary.json").read_text())
    step = checkpoint_step(run.folder / "ckpts" / "last.ckpt")
    assert (summary["status"], summary["step"]) == ("interrupted", step)
    assert [path.name for path in (run.folder / "ckpts").glob("step-*")] == [f"step-{step:06d}.ckpt"]
    assert run.text.count(f"Stopped at step {step} of") == 1 and "Traceback" not in run.text


def ends(pid: int) -> None:
    """Wait until a process whose parent is dead has ended; a container may have no process that reaps it."""
    deadline = time.monotonic() + HANG
    while True:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_run_saves_and_exits(tmp_path: Path, number: int, code: int) -> None:
    with training(tmp_path) as run:
        run.wait_for_steps()
        run.process.send_signal(number)
        assert run.end() == code
        saved_once(run)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["cpu", "cpu:2"])
def test_a_run_saves_and_continues_and_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with training(tmp_path, devices) as run:
        run.wait_for_steps()
        os.kill([run.process.pid, *run.workers][-1], signal.SIGUSR1)
        run.wait_until(lambda: "SLURM job 17 is requeued" in run.text, "requeue")
        step = checkpoint_step(run.folder / "ckpts" / "last.ckpt")
        assert f"Saved a checkpoint at step {step} (SIGUSR1)" in run.text
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143 and (tmp_path / "called").read_text() == "requeue 17\n"
        saved_once(run)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["all", "first", "second"])
@pytest.mark.parametrize("stopped", [None, "first", "second"])
def test_all_ranks_save_once_and_exit(tmp_path: Path, to: str, stopped: str | None) -> None:
    """A signal to any rank stops all of them, also if one is stopped (SIGSTOP) and cannot finish its step."""
    if to == stopped:
        pytest.skip("a stopped process receives the signal when it is continued")
    with training(tmp_path, "cpu:2") as run:
        run.wait_for_steps()
        ranks = {"first": run.process.pid, "second": run.workers[0]}
        if stopped is not None:
            os.kill(ranks[stopped], signal.SIGSTOP)
        for pid in ranks.values() if to == "all" else [ranks[to]]:
            os.kill(pid, signal.SIGTERM)
        assert run.end() == 143
        saved_once(run)
        assert not psutil.pid_exists(ranks["second"])


@pytest.mark.slow
def test_the_death_of_a_rank_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with training(tmp_path, "cpu:2", checkpoint={"every_n_steps": 1}) as run:
        run.wait_for_steps()
        worker = run.workers[0]
        os.kill(worker, signal.SIGKILL)
        assert run.end() == 1
        assert f"rank 1 (process {worker}) was killed by SIGKILL" in run.text
        summary = json.loads((run.folder / "summary.json").read_text())
        assert summary["status"] == "failed" and "rank 1" in summary["error"]
        assert checkpoint_step(run.folder / "ckpts" / "last.ckpt") == summary["step"]


@pytest.mark.slow
def test_the_death_of_the_first_rank_ends_the_others(tmp_path: Path) -> None:
    with training(tmp_path, "cpu:2") as run:
        run.wait_for_steps()
        worker, first = run.workers[0], run.process.pid
        run.process.send_signal(signal.SIGKILL)
        run.end()
        ends(worker)
        assert f"rank 0 (process {first}) has ended" in run.text


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    with training(tmp_path, "cpu:2") as run:
        run.wait_for_steps()
        worker = run.workers[0]
        os.kill(worker, signal.SIGSTOP)
        run.wait_until(lambda: f"rank 1 (process {worker}) is stopped" in run.text, "warning")
        os.kill(worker, signal.SIGCONT)
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["cpu", "cpu:2"])
def test_a_step_without_end_is_left_after_the_grace_period(tmp_path: Path, devices: str) -> None:
    hangs = f"""
from scoredist3d.training.callbacks import ProgressLine
def hang(self, trainer, module, step):
    if step == 5:
        print("hangs", flush=True)
        {LONG_OPERATOR}
ProgressLine.after_step = hang
"""
    with training(
        tmp_path, devices, prelude=hangs, checkpoint={"every_n_steps": 1}, trainer={"grace_seconds": 1.0}
    ) as run:
        run.wait_until(lambda: "hangs" in run.text, "hang")
        workers = run.workers
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 143
        summary = json.loads((run.folder / "summary.json").read_text())
        assert (summary["status"], summary["step"]) == ("interrupted", 4)
        assert summary["error"] == "stopped at once after SIGTERM"
        assert checkpoint_step(run.folder / "ckpts" / "last.ckpt") == 4
        for worker in workers:
            ends(worker)
