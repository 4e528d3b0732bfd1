#!/usr/bin/env python
"""Benchmark of all distillation methods on the embedded prior: quality, diversity, color, detail, NFE and time.

    python benchmarks/methods.py --out outputs/methods --gpu 0 --jobs 12
    python benchmarks/methods.py --out outputs/methods --only-2d --methods sds vsd --prompts "a red mug" "a chair"
    python benchmarks/methods.py --out outputs/methods --docs docs/images/methods

The methods are the recipes ``configs/text-to-2d/*.yaml`` and ``configs/text-to-3d/*.yaml``. In 2D the seeds of a prompt
are the particles of one run (methods that couple particles do so: the particles of VSD share one phi). In 3D each seed
is a separate run, seen from 8 held-out views. Editing methods start from samples (in 3D: from an object made by SDS) of
another color if the prompt names one, otherwise of another category. There are two references: real renders of the
caption, which give the floor of every figure, and DDIM samples of the prior.

Each 3D run also exports its GLB with the exporter of its recipe. The file is read back and compared with the true
object of the prompt as in ``quickstart_quality.py``: PSNR, angle between the normals, wrong depths, and the dihedral
angle, sharp edges and genus of both meshes. Prompts without a color have no true object. A failed export is listed
below the table, and the other figures of its run are kept. The means of the 3D table have standard errors.

Arguments of the form key=value are config overrides for all runs. Runs found in ``--out`` are reused unless their
recipe has changed or, in 3D, the figures of the GLB are missing. The benchmark writes ``methods.md``,
``methods.json``, ``*.svg`` and ``sheet-*.png`` (in 3D with the views of each GLB below those of the field), and exits
with 1 if a run failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import methods_report
import methods_runs
from methods_references import REFERENCES
from methods_runs import DIMENSIONS, Job, Task
from overrides import split_overrides

PROMPTS_2D = (
    "a red mug",
    "a blue chair",
    "a green pine tree",
    "a yellow house",
    "an orange rocket",
    "a mug",
    "a teapot",
    "a chair",
    "a car",
    "a mushroom",
)
PROMPTS_3D = ("a red mug", "a blue chair", "a green pine tree", "a yellow house", "an orange rocket")
TASKS_PER_JOB = {"2d": 5, "3d": 2}
"""Tasks per process: few, so that processes end at similar times, but more than one to share the start-up time."""


@dataclass(frozen=True)
class Outcome:
    """Result of one worker process."""

    job: Job
    failed: bool


def jobs_of(arguments: argparse.Namespace, overrides: list[str]) -> list[Job]:
    """Jobs that are not finished yet; the references come first, because they take longest on a CPU."""
    wanted: list[Job] = []
    for dimension in chosen_dimensions(arguments):
        prompts = arguments.prompts if dimension == "2d" else arguments.prompts_3d
        seeds = [arguments.seeds] if dimension == "2d" else list(range(arguments.seeds_3d))
        methods = [*REFERENCES, *methods_runs.recipes(dimension, arguments.methods)]
        for method in methods:
            tasks = [Task(prompt, seed) for prompt in prompts for seed in seeds]
            recipe = methods_runs.fingerprint(dimension, method, overrides)
            open_tasks = [t for t in tasks if not methods_runs.is_done(arguments.out, dimension, method, t, recipe)]
            for start in range(0, len(open_tasks), TASKS_PER_JOB[dimension]):
                wanted.append(Job(dimension, method, tuple(open_tasks[start : start + TASKS_PER_JOB[dimension]])))
    return wanted


def chosen_dimensions(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Dimensions to run: ``2d``, ``3d`` or both."""
    left_out = {"3d"} if arguments.only_2d else {"2d"} if arguments.only_3d else set()
    return tuple(dimension for dimension in DIMENSIONS if dimension not in left_out)


def run_process(arguments: argparse.Namespace, what: list[str], log: Path, overrides: list[str]) -> bool:
    """Run a worker in its own process; returns whether it failed."""
    command = [sys.executable, __file__, "--out", str(arguments.out), "--gpu", arguments.gpu, *what, *overrides]
    environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    return code != 0


def run_job(arguments: argparse.Namespace, number: int, job: Job, overrides: list[str]) -> Outcome:
    """Run one job and report its outcome."""
    log = arguments.out / "logs" / f"{job.dimension}-{job.method}-{number}.txt"
    failed = run_process(arguments, ["--worker", job.to_text()], log, overrides)
    print(f"{job.dimension} {job.method} ({len(job.tasks)}): {f'FAILED, see {log}' if failed else 'done'}", flush=True)
    return Outcome(job, failed)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; finished runs in it are reused")
    parser.add_argument("--methods", nargs="+", default=[], help="recipes to run; all of them by default")
    parser.add_argument(
        "--prompts", nargs="+", default=list(PROMPTS_2D), help='2D prompts, "a COLOR CATEGORY" or "a CATEGORY"'
    )
    parser.add_argument("--prompts-3d", nargs="+", default=list(PROMPTS_3D))
    parser.add_argument("--seeds", type=int, default=4, help="number of particles of each 2D run, 2 or more")
    parser.add_argument("--seeds-3d", type=int, default=3, help="number of 3D runs per prompt")
    parser.add_argument("--only-2d", action="store_true")
    parser.add_argument("--only-3d", action="store_true")
    parser.add_argument(
        "--timing-steps",
        type=int,
        default=30,
        help="2D steps per method that are timed with nothing else running; 0 for none",
    )
    parser.add_argument("--gpu", default="cpu", help="'cpu' or a GPU number")
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of parallel processes, each for one method and some prompts"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    parser.add_argument("--docs", type=Path, help="folder for one small image per method and dimension")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs="+", help=argparse.SUPPRESS)
    given = sys.argv[1:] if argv is None else argv
    options, overrides = split_overrides(given)
    arguments = parser.parse_args(options)
    if arguments.worker:
        return methods_runs.work(Job.from_text(arguments.worker), arguments.out, arguments.gpu, overrides)
    if arguments.time:
        return methods_runs.time_methods(
            arguments.time, arguments.timing_steps, arguments.seeds, arguments.out, arguments.gpu, overrides
        )
    if arguments.seeds < 2:
        parser.error("--seeds must be 2 or more, because diversity is measured between the seeds of a prompt")
    jobs = jobs_of(arguments, overrides)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(lambda n: run_job(arguments, n, jobs[n], overrides), range(len(jobs))))
    failures = [f"{o.job.dimension} {o.job.method}" for o in outcomes if o.failed]
    untimed = methods_runs.untimed(arguments.out, arguments.methods, overrides) if arguments.timing_steps else []
    if untimed and not arguments.only_3d:
        what = ["--time", *untimed, "--timing-steps", str(arguments.timing_steps), "--seeds", str(arguments.seeds)]
        if run_process(arguments, what, arguments.out / "logs" / "timing.txt", overrides):
            failures.append("timing")
    command = "python benchmarks/methods.py " + shlex.join(given)
    found = methods_report.write(arguments.out, command, chosen_dimensions(arguments), arguments.docs)
    if failures or not found:
        print(f"failed: {', '.join(failures) or 'nothing was measured'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
