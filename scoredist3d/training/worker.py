"""Main program of ranks 1 .. n-1 of a run on several devices, started by ``distributed.Workers``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from scoredist3d.custom import load_custom
from scoredist3d.reasons import ExplainedError, part
from scoredist3d.signals import SAVE_SIGNAL, SignalReceived


def main() -> int:
    """Train as one of the ranks 1 .. n-1, without output, and return the exit code; only rank 0 writes files.

    The resolved config is read from the standard input.
    """
    # Ctrl-C reaches every process of the terminal, and a request to save may reach every process of a job. Until this
    # process can stop gracefully, rank 0 ends it, and there is nothing to save.
    for number in (signal.SIGINT, SAVE_SIGNAL):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="scoredist3d.training.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--devices", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--custom", type=Path, action="append", default=[])
    options = parser.parse_args()
    load_custom(options.custom)
    try:
        return _train(options, sys.stdin.buffer.read().decode())
    except SignalReceived as received:
        return received.exit_code


def _train(options: argparse.Namespace, text: str) -> int:
    from scoredist3d.config.validation import load_text
    from scoredist3d.training.console import Console
    from scoredist3d.training.distributed import (
        SECONDS_UNTIL_REAPED,
        Devices,
        end_with_parent,
        is_connection_error,
    )
    from scoredist3d.training.failures import explained
    from scoredist3d.training.fit import RankContext, begin, build_system, fit
    from scoredist3d.training.folder import RunFolder
    from scoredist3d.training.interrupt import InterruptGuard

    config, console = load_text(text), Console(quiet=True)
    with InterruptGuard(console.say, config.trainer.grace_seconds) as guard:
        end_with_parent(options.parent, options.rank, guard)
        guard.on_stop = lambda: _continue(options.parent)
        logging.getLogger("scoredist3d").setLevel(logging.CRITICAL)  # Rank 0 logs the same messages.
        spec = options.devices if options.devices.startswith("cpu") else [int(i) for i in options.devices.split(",")]
        context = RankContext(Devices.parse(spec), options.rank, options.port)
        try:
            with part("the start-up"):
                system = build_system(config, context)
                begin(system, config, context, resumed=options.resume is not None)
            guard.graceful = True
            fit(system, config, RunFolder(options.folder), context, console, guard, resume=options.resume)
        except Exception as error:
            if is_connection_error(error):
                time.sleep(SECONDS_UNTIL_REAPED)  # Rank 0 or `end_with_parent` reports the rank that has ended first.
                raise
            told = explained(error, config)
            if not isinstance(told, ExplainedError):
                raise
            print(f"error: rank {options.rank}: {told}", file=sys.stderr, flush=True)
            return 1
    return guard.exit_code if guard.agreed else 0


def _continue(parent: int) -> None:
    """Continue rank 0 if it is stopped (SIGSTOP), since all ranks have to save the last state together."""
    if os.getppid() == parent:
        with suppress(OSError):
            os.kill(parent, signal.SIGCONT)


if __name__ == "__main__":
    sys.exit(main())
