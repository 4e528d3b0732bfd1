"""A run whose computer loses power at any time loses nothing but the steps since its last checkpoint.

One run is recorded. For the moment ahead of each of its file operations, the folder is built that a file system may
show after a power cut, in the models of :class:`shared.disk_records.Survival`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from shared.disk_records import DiskState, Survival, load_states
from shared.fault_cases import FaultCase, spread
from shared.figures import counted

from scoredist3d import cli
from scoredist3d.training.folder import LAST_CHECKPOINT, step_of

Cases = Callable[..., FaultCase]
Tree = dict[str, bytes | None]
NAMES = ["images", "implicit-volume", "extended", "pipeline"]


@dataclass
class PowerCuts:
    """The recorded states of the disk of one case."""

    case: FaultCase
    states: list[DiskState]

    @classmethod
    def of(cls, case: FaultCase) -> PowerCuts:
        out = case.folder / "recorded"
        result = case.folder / "states"
        if not result.exists():
            outcome = case.command(case.prepared(out), fault="record", result=str(result))
            assert outcome.code == cli.OK, outcome.text
        return cls(case, load_states(result))

    def different(self, survival: Survival) -> list[tuple[str, Tree]]:
        """Description and files of the states that differ from the one before."""
        found: list[tuple[str, Tree]] = []
        for number, state in enumerate(self.states, 1):
            tree = state.after_power_cut(survival)
            if not found or tree != found[-1][1]:
                found.append((f"{number}, {state.operation}", tree))
        return found

    def saved_steps(self) -> Iterator[dict[str, int]]:
        """For each state, the steps of the newest checkpoints that had been saved completely, by stage."""
        steps = dict.fromkeys(self.case.whole.stages, 0)
        for state in self.states:
            yield dict(steps)
            kind, _, path = state.operation.partition(" ")
            if kind == "fsync" and path.endswith("/ckpts"):
                names = state.entries(path)
                last = [step_of(Path(name)) for name, key in names.items() if key == names.get(LAST_CHECKPOINT)]
                stage = path.split("/")[-2]
                steps[stage if stage in steps else "."] = max(last, default=0)

    def write(self, tree: Tree) -> Path:
        """A folder with the files of a state."""
        out = self.case.folder / "cut"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, content in tree.items():
            if content is None:
                (out / name).mkdir()
            else:
                (out / name).write_bytes(content)
        return out


@pytest.mark.parametrize("survival", Survival)
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_products_are_whole_or_absent_and_checkpoints_stay(fault_case: Cases, name: str, survival: Survival) -> None:
    cuts = PowerCuts.of(fault_case(name))
    whole, problems = cuts.case.whole, []
    before: tuple[Tree, dict[str, int]] | None = None
    for state, saved in zip(cuts.states, cuts.saved_steps(), strict=True):
        tree = state.after_power_cut(survival)
        if (tree, saved) == before:
            continue
        before, out, known = (tree, saved), cuts.write(tree), len(problems)
        steps = dict.fromkeys(saved, 0)
        if list(out.glob("run/*")):
            problems += [f"{state.operation}: {problem}" for problem in whole.problems(cuts.case.run_in(out))]
            steps |= whole.newest_steps(cuts.case.run_in(out))
        lost = [f"step {saved[stage]} of {stage}" for stage in saved if steps[stage] < saved[stage]]
        problems += [f"{state.operation}: {what} is lost" for what in lost]
        counted("prefixes", problems[known:])
    assert problems == []


@pytest.mark.parametrize("survival", Survival)
@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_a_run_is_durable_when_it_ends(fault_case: Cases, name: str, survival: Survival) -> None:
    cuts = PowerCuts.of(fault_case(name))
    run = cuts.case.run_in(cuts.write(cuts.states[-1].after_power_cut(survival)))
    leftovers = [path for path in (run / ".lock", *run.glob("*/.lock")) if path.exists()]
    for path in leftovers:  # The deletion of a lock that nobody holds need not be durable.
        path.unlink()
    assert cuts.case.whole.differences(run) == []


@pytest.mark.parametrize("survival", Survival)
@pytest.mark.parametrize("share", range(3))
def test_a_run_resumes_after_a_power_cut(fault_case: Cases, survival: Survival, share: int) -> None:
    assert _lost(PowerCuts.of(fault_case("images")), survival, 3, share) == []


@pytest.mark.slow
@pytest.mark.parametrize("survival", Survival)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_after_many_power_cuts(fault_case: Cases, name: str, survival: Survival) -> None:
    cuts = PowerCuts.of(fault_case(name))
    number = len(cuts.states) if name == "images" else 12
    assert [problem for share in range(number) for problem in _lost(cuts, survival, number, share)] == []


def _lost(cuts: PowerCuts, survival: Survival, number: int, share: int) -> list[str]:
    """What is lost after one of ``number`` evenly spread power cuts."""
    states = cuts.different(survival)
    points = spread(len(states), number)
    if share >= len(points):
        return []
    where, tree = states[points[share] - 1]
    problems = cuts.case.recover(cuts.write(tree))
    counted("resumed prefixes", problems)
    return [f"{where}: {problem}" for problem in problems]
