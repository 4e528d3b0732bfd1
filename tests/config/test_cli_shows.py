"""The command line: dry runs, lists, descriptions, custom packages, and the real program."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from shared.custom_packages import forget_custom
from shared.fake_runs import FakeRuns, make_run

from scoredist3d import cli

ROOT = Path(__file__).resolve().parents[2]


# Dry run, list, describe


def test_a_dry_run_prints_a_config_that_runs_and_touches_nothing(
    here: Path, runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert cli.main(["--config", "c.yaml", "--train", "--dry-run", "prompt=x", "seed=3"]) == cli.OK
    captured = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
    assert runs.calls == [] and captured.err == ""
    printed = yaml.safe_load(captured.out)
    assert (printed["prompt"], printed["seed"], printed["system"]["guidance"]["guidance_scale"]) == ("x", 3, 7.5)
    (here / "again.yaml").write_text(captured.out)
    assert cli.main(["--config", "again.yaml", "--dry-run"]) == cli.OK
    assert capsys.readouterr().out == captured.out


def test_list_and_describe(here: Path, runs: FakeRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == cli.OK
    assert "  guidance          scoredist3d/guidance/\n" in capsys.readouterr().out
    assert cli.main(["--list", "guidance"]) == cli.OK
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  sdi  Stand-in sdi.",
        "  sds  Stand-in sds.  (arXiv 2209.14988)",
    ]
    assert cli.main(["--describe", "geometry/volume"]) == cli.OK
    assert capsys.readouterr().out.splitlines() == [
        "geometry/volume: Stand-in volume.",
        "",
        "  key          default  accepts",
        "  radius       1.0      a number > 0",
        "                          Radius.",
        "  grid.levels  4        a whole number from 1 to 32",
        "                          Levels.",
        "  grid.scale   1.5      a number >= 1",
        "                          Growth.",
        "  fine         null     a block (levels, scale) or null",
        "                          A second grid.",
    ]
    assert cli.main(["--describe", "system/text-to-3d"]) == cli.OK
    text = capsys.readouterr().out
    assert "  guidance          sds          a guidance (--list guidance)\n" in text
    assert "a mapping from loss names (--list loss) to weight values or blocks\n" in text
    assert cli.main(["--describe", "material/paint"]) == cli.OK
    assert "color  (required)" in capsys.readouterr().out


# Custom packages


@pytest.fixture
def no_custom_yet() -> Iterator[None]:
    """No user package has been imported by an earlier test, and none stays for a later one."""
    forget_custom()
    yield
    forget_custom()


@pytest.mark.parametrize("mode", ["train", "validate", "test", "export"])
def test_commands_that_build_a_run_import_custom_of_the_current_folder(
    here: Path, runs: FakeRuns, no_custom_yet: None, mode: str
) -> None:
    run = make_run(here / "outputs" / "try" / "mug@1")
    (here / "custom").mkdir()
    (here / "custom" / "mark.py").write_text("open('imported', 'w').close()\n")
    arguments = ["--config", "c.yaml", "prompt=x", "--train"] if mode == "train" else [f"--{mode}", str(run)]
    assert cli.main(arguments) == cli.OK
    assert (here / "imported").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--list"],
        ["--list", "guidance"],
        ["--describe", "guidance/sds"],
        ["--config", "c.yaml", "--train", "--dry-run", "prompt=x"],
        ["--export", "run", "--dry-run"],
        ["--version"],
        ["--help"],
    ],
)
def test_commands_that_only_show_something_run_no_code_of_the_current_folder(
    here: Path, runs: FakeRuns, no_custom_yet: None, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "run")
    (here / "custom").mkdir()
    (here / "custom" / "mark.py").write_text("open('imported', 'w').close()\n")
    try:
        assert cli.main(arguments) == cli.OK
    except SystemExit as done:  # argparse ends --help and --version this way
        assert done.code == cli.OK
    assert not (here / "imported").exists()
    assert capsys.readouterr().out


def test_the_hint_says_how_a_dry_run_imports_custom(
    here: Path, runs: FakeRuns, no_custom_yet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "custom").mkdir()
    arguments = ["--config", "c.yaml", "--train", "--dry-run", "prompt=x", "system.guidance.type=mine"]
    assert cli.main(arguments) == cli.USAGE_ERROR
    assert "if the name is defined there, add --custom custom" in capsys.readouterr().err
    assert cli.main(["--list", "--custom", "nowhere"]) == cli.USAGE_ERROR
    assert capsys.readouterr().err.startswith("error: --custom: there is no folder nowhere")


def test_custom_packages_register_and_a_broken_one_is_named(
    here: Path, runs: FakeRuns, no_custom_yet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    component = (
        "from dataclasses import dataclass\n"
        "from scoredist3d.config import ComponentConfig, option\n"
        "from scoredist3d.registry import register\n"
        '@register("guidance", "mine", summary="Mine.")\n'
        "class Mine:\n"
        "    @dataclass\n"
        "    class Config(ComponentConfig):\n"
        '        strength: float = option(2.0, "How much.")\n'
    )
    for path, text in {
        "custom/_hidden/__init__.py": "raise RuntimeError('never imported')\n",
        "custom/alone.py": "x = 1\n",
        "custom/broken/__init__.py": "from custom.broken.part import missing_name\n",
        "custom/broken/part.py": "",
        "custom/good/__init__.py": "from .guidance import Mine\n",
        "custom/good/guidance.py": component,
        "custom/typo.py": "def f(:\n",
    }.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(text)
    dry_run = ["--custom", "custom", "--config", "c.yaml", "--train", "--dry-run", "prompt=x"]
    arguments = [*dry_run, "system.guidance.type=mine"]
    assert cli.main([*arguments, "system.guidance.strength=3"]) == cli.OK
    captured = capsys.readouterr()
    assert yaml.safe_load(captured.out)["system"]["guidance"] == {"type": "mine", "strength": 3.0}
    first, second = captured.err.splitlines()
    assert first.startswith(
        "warning: custom/broken could not be loaded: ImportError: cannot import name 'missing_name'"
    )
    assert first.endswith(f"({here}/custom/broken/__init__.py, line 1)")
    assert second.startswith("warning: custom/typo could not be loaded: SyntaxError: ")
    assert second.endswith(f"({here}/custom/typo.py, line 1)")
    assert cli.main([*arguments[:-1], "system.guidance.type=theirs"]) == cli.USAGE_ERROR
    assert capsys.readouterr().err.endswith("(a custom package could not be loaded, see the warning above)\n")


# The real program

HANG = 600.0  # seconds: no measure of speed, but the end of a test that would wait for ever


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=HANG, check=False)


def test_launch_from_another_folder(tmp_path: Path) -> None:
    done = launch("--config", "configs/quickstart.yaml", "--train", "--dry-run", "prompt=a red mug", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [stage["prompt"] for stage in yaml.safe_load_all(done.stdout)] == ["a red mug"] * 2
    assert list(tmp_path.iterdir()) == []


def test_launch_without_a_prompt(tmp_path: Path) -> None:
    done = launch("--config", "configs/quickstart.yaml", "--train", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        'error: prompt: is required but missing; set it in a config file or on the command line: prompt="a red mug"\n'
    )
