"""Fuzz the loaders of files from others for minutes or hours, and save the inputs that they handle badly.

    python scripts/fuzz.py --minutes 10                        # all targets in turn
    python scripts/fuzz.py --minutes 30 --seed 7 configs meshes

Each target runs in a child process with a limit of its memory, so that a crash, a hang or an exhausted memory is a
finding, too, and not the end. Every finding is printed and saved in ``<save>/<target>-<seed>-<number>/`` with the files
of the input and the problem; ``--replay <target> <number>`` runs one input again. The exit code is 1 if there are any.
A target is an entry of :data:`TARGETS`: a function that makes an input from a random generator, and one that checks it.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import fuzz_additions, fuzz_configs, fuzz_files, fuzz_priors
from faults.fuzzing import Finding, FuzzTarget, input_of, run_inputs

TARGETS: dict[str, FuzzTarget] = {
    "configs": fuzz_configs.TARGET,
    "priors": fuzz_priors.TARGET,
    "additions": fuzz_additions.TARGET,
    **fuzz_files.TARGETS,
}
MEMORY_BYTES = 4 * 2**30
HANG_SECONDS = 60.0
BATCH = 2000


def child(name: str, seed: int, start: int, stop: int) -> None:
    """Check a range of inputs, with a limit of the memory; prints a JSON line before each and for each finding."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        target.check(input_of(target, seed, 0), Path(folder) / "input")  # imports the loader before the limit is set
        _limit_memory()

        def begun(number: int) -> None:
            print(json.dumps({"begun": number}), flush=True)

        for finding in run_inputs(target, seed, range(start, stop), Path(folder) / "input", begun):
            print(json.dumps({"number": finding.number, "problem": finding.problem}), flush=True)
    print(json.dumps({"done": stop}), flush=True)


def _limit_memory() -> None:
    """Limit the address space to what is mapped now and :data:`MEMORY_BYTES`, where the system supports it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    import psutil

    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def findings(name: str, seed: int, deadline: float, counts: Counter[str]) -> Iterator[Finding]:
    """Run a target until the deadline (of ``time.monotonic``); counts inputs."""
    start = 0
    while time.monotonic() < deadline:
        begun = start - 1
        for message in _messages([name, str(seed), str(start), str(start + BATCH)], deadline):
            if "begun" in message:
                begun = message["begun"]
                counts[name] += 1
            elif "problem" in message:
                yield Finding(message["number"], message["problem"])
            elif "died" in message:
                yield Finding(begun, message["died"])
        start = begun + 1


def _messages(arguments: Sequence[str], deadline: float) -> Iterator[dict[str, Any]]:
    """JSON lines of a child process; ``died`` says how it ended, unless it was done or the deadline has passed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines))
    reader.start()
    ended = ""
    try:
        while time.monotonic() < deadline:
            line = lines.get(timeout=HANG_SECONDS)
            message = json.loads(line) if line else {}
            if not line:
                ended = f"the process ended with exit status {process.wait()}"
                break
            if "done" in message:
                break
            yield message
    except queue.Empty:
        ended = f"no result after {HANG_SECONDS:.0f} s"
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
    if ended:
        yield {"died": ended}


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Put all lines of a stream into a queue, and an empty one at its end."""
    for line in stream:
        lines.put(line)
    lines.put("")


def save(name: str, seed: int, finding: Finding, folder: Path) -> Path:
    """Save the input of a finding, its problem and how to run it again."""
    place = folder / f"{name}-{seed}-{finding.number}"
    input_of(TARGETS[name], seed, finding.number).write(place)
    again = f"python scripts/fuzz.py --seed {seed} --replay {name} {finding.number}"
    (place / "problem.txt").write_text(f"{finding.problem}\n{again}\n", encoding="utf-8", errors="backslashreplace")
    return place


def replay(name: str, seed: int, number: int) -> int:
    """Check one input in this process."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(run_inputs(TARGETS[name], seed, [number], Path(folder) / "input"))
    for finding in found:
        print(finding.problem)
    return 1 if found else 0


def main() -> int:
    """Run the targets and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--minutes", type=float, default=1.0, help="time for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=ROOT / "outputs" / "fuzz", metavar="FOLDER")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "NUMBER"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *numbers = options.child
        child(name, *map(int, numbers))
        return 0
    if options.replay:
        return replay(options.replay[0], options.seed, int(options.replay[1]))
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {min(unknown)}; the targets are {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    counts: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for name in names:
        for finding in findings(name, options.seed, time.monotonic() + 60 * options.minutes / len(names), counts):
            found[name] += 1
            print(
                f"{name} {finding.number}: {finding.problem[:400]}\n  {save(name, options.seed, finding, options.save)}"
            )
    for name in names:
        print(f"{name}: {counts[name]} inputs, {found[name]} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
