"""Requeueing of the SLURM job that a run belongs to."""

from __future__ import annotations

import os
import shutil
import subprocess


def requeue_job() -> str | None:
    """Requeue the SLURM job of this process; returns a message, or None outside of SLURM.

    The job is known from ``SLURM_JOB_ID`` and requeued with ``scontrol``.
    """
    job, command = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if not job or command is None:
        return None
    try:
        done = subprocess.run([command, "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"warning: SLURM job {job} was not requeued: {error}"
    if done.returncode != 0:
        return f"warning: SLURM job {job} was not requeued: {done.stderr.strip() or f'exit code {done.returncode}'}"
    return f"SLURM job {job} is requeued; let its script continue the run with --train --resume"
