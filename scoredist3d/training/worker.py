"""Main program of ranks 1 .. n-1 of a run on several devices, started by ``distributed.Workers``."""

from __future__ import annotations

import argparse
import logging
import signal
from pathlib import Path

from scoredist3d.custom import load_custom


def main() -> None:
    """Train as one of the ranks 1 .. n-1, without output; only rank 0 prints and writes files."""
    parser = argparse.ArgumentParser(prog="scoredist3d.training.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--devices", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--custom", type=Path, action="append", default=[])
    options = parser.parse_args()
    load_custom(options.custom)

    from scoredist3d.config.validation import load_experiment
    from scoredist3d.training.console import Console
    from scoredist3d.training.distributed import Devices, end_with_parent
    from scoredist3d.training.fit import RankContext, begin, build_system, fit
    from scoredist3d.training.folder import RunFolder
    from scoredist3d.training.interrupt import InterruptGuard

    end_with_parent(options.parent)
    # Ctrl-C reaches every process of the terminal; rank 0 decides for all ranks when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("scoredist3d").setLevel(logging.CRITICAL)  # Rank 0 logs the same messages.
    folder = RunFolder(options.folder)
    config = load_experiment([options.config])
    spec = options.devices if options.devices.startswith("cpu") else [int(i) for i in options.devices.split(",")]
    context = RankContext(Devices.parse(spec), options.rank, options.port)
    console = Console(quiet=True)
    guard = InterruptGuard(console.say, active=False)
    system = build_system(config, context)
    begin(system, config, context, resumed=options.resume is not None)
    fit(system, config, folder, context, console, guard, resume=options.resume)


if __name__ == "__main__":
    main()
