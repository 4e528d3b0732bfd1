"""Short seeded runs of the fuzzers, and the inputs that were once handled badly."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import fuzz
import pytest
from faults import fuzz_additions, fuzz_configs, fuzz_priors, fuzzing
from faults.fuzzing import FuzzInput, FuzzTarget, input_of, mutated, run_inputs

from scoredist3d import cli

INPUTS, PIPELINES = 1200, 120


def test_hostile_configs_load_or_give_one_message(tmp_path: Path) -> None:
    assert list(run_inputs(fuzz_configs.TARGET, 2026, range(INPUTS), tmp_path / "input")) == []


def test_hostile_model_folders_load_or_give_one_message(tmp_path: Path) -> None:
    assert list(run_inputs(fuzz.TARGETS["priors"], 2026, range(PIPELINES), tmp_path / "input")) == []


def test_hostile_additions_load_or_give_one_message(tmp_path: Path) -> None:
    assert list(run_inputs(fuzz.TARGETS["additions"], 2026, range(PIPELINES), tmp_path / "input")) == []


@pytest.mark.parametrize(("module", "count", "least"), [(fuzz_additions, 60, 6), (fuzz_priors, 24, 3)])
def test_some_models_are_valid_and_some_are_not(tmp_path: Path, module: ModuleType, count: int, least: int) -> None:
    def refused(number: int) -> bool:
        input_of(module.TARGET, 0, number).write(tmp_path / str(number))
        try:
            module.load_and_predict(tmp_path / str(number))
        except ValueError:
            return True
        return False

    outcomes = [refused(number) for number in range(count)]
    assert min(outcomes.count(True), outcomes.count(False)) >= least


def test_valid_additions_load(tmp_path: Path) -> None:
    for name, content in fuzz_additions.valid_files().items():
        if "both" not in name:  # the second text encoder is absent
            FuzzInput({name: content}).write(tmp_path / name)
            fuzz_additions.load_and_predict(tmp_path / name)


def test_valid_model_folders_load(tmp_path: Path) -> None:
    for name, files in fuzz_priors.pipelines().items():
        FuzzInput(files).write(tmp_path / name)
        fuzz_priors.load_and_predict(tmp_path / name)


@pytest.mark.slow
def test_more_hostile_model_folders(tmp_path: Path) -> None:
    assert list(run_inputs(fuzz.TARGETS["priors"], 7, range(10 * PIPELINES), tmp_path / "input")) == []


@pytest.mark.slow
def test_more_hostile_additions(tmp_path: Path) -> None:
    assert list(run_inputs(fuzz.TARGETS["additions"], 7, range(10 * PIPELINES), tmp_path / "input")) == []


@pytest.mark.slow
def test_more_hostile_configs(tmp_path: Path) -> None:
    assert list(run_inputs(fuzz_configs.TARGET, 7, range(10 * INPUTS), tmp_path / "input")) == []


def test_some_inputs_are_valid_and_some_are_not(tmp_path: Path) -> None:
    """Otherwise, the fuzzer would test one side only."""
    codes = []
    for number in range(80):
        input_of(fuzz_configs.TARGET, 0, number).write(tmp_path)
        arguments = input_of(fuzz_configs.TARGET, 0, number).arguments
        codes.append(cli.main(["--config", str(tmp_path / "config.yaml"), "--dry-run", *arguments]))
    assert {cli.OK, cli.USAGE_ERROR} == set(codes) and codes.count(cli.OK) >= 4


@pytest.mark.parametrize("name", ["splats", "images", "checkpoints", "tables"])
def test_valid_files_load(name: str, tmp_path: Path) -> None:
    """The files that the fuzzer changes are valid, so it starts behind the first check of a loader."""
    from faults import fuzz_files

    for file, content in getattr(fuzz_files, name)().items():
        (tmp_path / file).write_bytes(content)
        {
            "splats": fuzz_files.load_splats,
            "images": fuzz_files.load_image,
            "checkpoints": fuzz_files.load_checkpoint,
            "tables": fuzz_files.load_table,
        }[name](tmp_path / file)


def test_valid_meshes_load(tmp_path: Path) -> None:
    from faults import fuzz_files

    for file, content in fuzz_files.meshes().items():
        (tmp_path / file).write_bytes(content)
    for file in fuzz_files.meshes():
        if not file.endswith((".mtl", ".png")):
            fuzz_files.load_mesh(tmp_path / file)


@pytest.mark.parametrize("name", ["tables", "meshes", "splats", "images", "checkpoints"])
def test_hostile_files_load_or_give_one_message(name: str, tmp_path: Path) -> None:
    assert list(run_inputs(fuzz.TARGETS[name], 2026, range(300), tmp_path / "input")) == []


def test_an_input_depends_on_seed_and_number_only() -> None:
    for target in fuzz.TARGETS.values():
        assert input_of(target, 3, 5) == input_of(target, 3, 5)
        assert len({str(input_of(target, 3, number)) for number in range(8)}) > 4
    rng = random.Random(0)
    assert sum(mutated(rng, b"some bytes 123") != b"some bytes 123" for _ in range(100)) > 80


@pytest.mark.parametrize(
    ("code", "err", "out", "said"),
    [
        (0, "", "prompt: x", None),
        (2, "error: prompt: must not be empty\n", "", None),
        (2, "error: " + "x" * 501, "", "a message of 501 characters"),
        (1, "error: bad", "", "exit code 1"),
        (2, "Traceback (most recent call last):\n", "", "exit code 2"),
        (2, "error: <object object at 0x7f00>", "", "internal text"),
        (2, "error: a KeyError in it", "", "internal text 'KeyError'"),
        (2, "error: \x07", "", "unprintable"),
        (0, "", "", "success without"),
    ],
)
def test_bad_outcomes_are_recognized(code: int, err: str, out: str, said: str | None, tmp_path: Path) -> None:
    problem = fuzz_configs.problem_with(code, err, out, tmp_path)
    assert problem is None if said is None else problem is not None and said in problem


def test_exceptions_are_findings_and_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(given: FuzzInput, folder: Path) -> str | None:
        raise KeyError("x")

    monkeypatch.setattr(fuzzing, "counted", lambda *_: None)  # This finding is no loss.
    broken = FuzzTarget(lambda rng: FuzzInput({"a.bin": rng.randbytes(4)}, ("a.bin",)), check)
    (finding,) = run_inputs(broken, 1, [4], tmp_path)
    assert (finding.number, finding.problem) == (4, "builtins.KeyError: 'x'")
    monkeypatch.setitem(fuzz.TARGETS, "broken", broken)
    place = fuzz.save("broken", 1, finding, tmp_path)
    assert place == tmp_path / "broken-1-4" and len((place / "a.bin").read_bytes()) == 4
    assert "--seed 1 --replay broken 4" in (place / "problem.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tables", "configs"])
def test_the_script_runs_targets_in_child_processes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--minutes", "0.2", "--save", str(tmp_path), name])
    assert fuzz.main() == 0
    assert list(tmp_path.iterdir()) == []
