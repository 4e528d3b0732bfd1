"""A run whose computer loses power at any time loses nothing but the steps since its last checkpoint.

One run is recorded. For the moment ahead of each of its file operations, the folder is built that a file system may
show after a power cut, in the models of :class:`shared.disk_records.Survival`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from shared.disk_records import DiskState, Survival, load_states
from shared.fault_cases import FaultCase, spread

from scoredist3d import cli

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
    newest = dict.fromkeys(whole.stages, 0)
    for where, tree in cuts.different(survival):
        out = cuts.write(tree)
        if not list(out.glob("run/*")):
            continue
        run = cuts.case.run_in(out)
        problems += [f"{where}: {problem}" for problem in whole.problems(run)]
        steps = newest | whole.newest_steps(run)
        problems += [
            f"{where}: step {newest[stage]} of {stage} is lost" for stage in newest if steps[stage] < newest[stage]
        ]
        newest = steps
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
    return [f"{where}: {problem}" for problem in cuts.case.recover(cuts.write(tree))]
