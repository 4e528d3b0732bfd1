from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared.custom_packages import forget_custom

import scoredist3d.training
from scoredist3d import cli, custom
from scoredist3d.signals import SignalReceived

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "name: try\nprompt: ???\nsystem: {guidance: {type: sds, guidance_scale: 7.5}}\n"


class FakeRuns:
    """Stands in for ``scoredist3d.training.run`` and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.outcome: Any = types.SimpleNamespace(interrupted=False, error=None)
        for name in ("run_training", "run_validation", "run_test", "run_export"):
            setattr(self, name, self.recorder(name))

    def recorder(self, name: str) -> Any:
        def record(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return self.outcome

        return record


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, components: None) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setitem(sys.modules, "scoredist3d.training.run", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(scoredist3d.training, "run", fake, raising=False)
    return fake


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with one config and no custom packages."""
    monkeypatch.chdir(tmp_path)
    for module in (cli, custom):
        monkeypatch.setattr(module, "checkout_root", lambda: None)
    monkeypatch.delenv("SCOREDIST3D_DEBUG", raising=False)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def make_run(folder: Path, *, time: int = 0, steps: int = 7) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "ckpts").mkdir()
    (folder / "ckpts" / "last.ckpt").write_bytes(b"state")
    resolved = folder / "configs" / "resolved.yaml"
    resolved.write_text(f"prompt: a mug\nname: {folder.parent.name}\ntrainer: {{max_steps: {steps}}}\n")
    os.utime(resolved, (1_700_000_000 + time,) * 2)
    return folder


# What is called


def test_train(here: Path, runs: FakeRuns) -> None:
    arguments = [
        "--config",
        "c.yaml",
        "--train",
        "prompt=a red mug",
        "--gpu",
        "cpu",
        "system.guidance.guidance_scale=20",
    ]
    assert cli.main(arguments) == cli.OK
    ((name, (config,), options),) = runs.calls
    assert name == "run_training" and (options["devices"], options["resume"]) == ("cpu", None)
    assert "guidance_scale: 20" in options["source"]
    assert config.prompt == "a red mug" and config.system.guidance.guidance_scale(0) == 20.0


def test_options_and_overrides_in_any_order(here: Path, runs: FakeRuns) -> None:
    assert cli.main(["prompt=x", "--train", "seed=4", "--config", "c.yaml", "name=other"]) == cli.OK
    config = runs.calls[0][1][0]
    assert (config.prompt, config.seed, config.name) == ("x", 4, "other")


@pytest.mark.parametrize(
    ("mode", "function"), [("validate", "run_validation"), ("test", "run_test"), ("export", "run_export")]
)
def test_a_run_brings_its_config_and_checkpoint(here: Path, runs: FakeRuns, mode: str, function: str) -> None:
    run = make_run(here / "outputs" / "try" / "mug@1")
    for given in (run, run / "ckpts" / "last.ckpt"):
        assert cli.main([f"--{mode}", str(given), "seed=5"]) == cli.OK
        name, (config, checkpoint), options = runs.calls.pop()
        assert name == function and options == {"devices": "auto"}
        assert checkpoint.samefile(run / "ckpts" / "last.ckpt")
        assert (config.prompt, config.trainer.max_steps, config.seed) == ("a mug", 7, 5)
    assert cli.main([f"--{mode}", "--resume", str(run)]) == cli.OK


def test_resume_takes_the_runs_config_and_what_is_given_now_on_top(here: Path, runs: FakeRuns) -> None:
    run = make_run(here / "outputs" / "try" / "mug@1")
    assert cli.main(["--train", "--resume", str(run), "trainer.max_steps=9"]) == cli.OK
    _, (config,), options = runs.calls[0]
    assert (config.prompt, config.trainer.max_steps) == ("a mug", 9)
    assert options["resume"].samefile(run / "ckpts" / "last.ckpt")


def test_the_newest_of_several_runs_is_taken_and_said(
    here: Path, runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(here / "outputs" / "try" / "b@1", time=10, steps=1)
    newest = make_run(here / "outputs" / "try" / "a@2", time=20, steps=2)
    assert cli.main(["--export", "outputs/try"]) == cli.OK
    assert runs.calls[0][1][0].trainer.max_steps == 2
    message = capsys.readouterr().err
    assert message == f"outputs/try contains 2 runs; using the newest, {newest.relative_to(here)}\n"
    assert cli.main(["--export", "outputs", "seed=1"]) == cli.OK
    assert runs.calls[1][1][0].trainer.max_steps == 2


def test_an_override_after_an_option_that_takes_a_value_is_still_an_override(here: Path, runs: FakeRuns) -> None:
    run = make_run(here / "outputs" / "try" / "mug@1")
    assert cli.main(["--resume", str(run), "--test", "seed=8"]) == cli.OK
    assert runs.calls[0][1][0].seed == 8
    assert cli.main(["--train", "--config", "c.yaml", "prompt=x"]) == cli.OK
    assert runs.calls[1][1][0].prompt == "x"


# Exit codes and messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no action given: add --train, --validate, --test, --export, --list or --describe; see --help for usage"),
        ("--train", "--train needs --config FILE, as in --config configs/quickstart.yaml"),
        (
            "--train --test x --config c.yaml",
            "give one of --train, --validate, --test, --export, not --train and --test",
        ),
        (
            "--config c.yaml --test",
            "--test needs a trained run: --test outputs/NAME/RUN, or a checkpoint with --resume",
        ),
        (
            "--trian --config c.yaml",
            "unknown option --trian. Did you mean '--train' or '--version' or '--anyway'? --help lists all options",
        ),
        ("--config c.yaml --train --gpu tpu", "--gpu must be cpu or distinct GPU numbers, such as 0 or 0,1; got 'tpu'"),
        ("--config c.yaml --train --gpu 0,0", "--gpu must be cpu or distinct GPU numbers, such as 0 or 0,1; got '0,0'"),
        ("--config c.yaml --train --gpu", "argument --gpu: expected one argument; see --help for usage"),
        (
            "--config c.yaml --train mug",
            "'mug' is neither an option nor key.path=value; write a prompt as prompt=\"mug\"",
        ),
        (
            "--config c.yaml --train",
            'prompt: is required but missing; set it in a config file or on the command line: prompt="a red mug"',
        ),
        ("--config c.yaml --train prompt=x sed=1", "sed: unknown key (value 1). Did you mean 'seed'?"),
        ("--config qqqq.yaml --train", "config file qqqq.yaml does not exist."),
        ("--test outputs/no", "run outputs/no does not exist."),
        ("--test .", ". is not a run folder: it has no configs/resolved.yaml; give a folder <name>/<tag>@<time>"),
        ("--describe guidance", "--describe needs KIND/NAME, as in guidance/sds; got 'guidance'"),
        ("--describe guidance/sdx", "no guidance is called 'sdx'. Did you mean 'sds' or 'sdi'? Known: sdi, sds"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    here: Path, runs: FakeRuns, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert cli.main(arguments.split()) == cli.USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""
    assert runs.calls == []


def test_a_gpu_that_is_not_there(
    here: Path, runs: FakeRuns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    arguments = ["--config", "c.yaml", "--train", "prompt=x", "--gpu"]
    assert cli.main([*arguments, "0,2"]) == cli.USAGE_ERROR
    assert capsys.readouterr().err == "error: --gpu: GPU 2 does not exist; this machine has GPUs 0 to 1\n"
    assert cli.main([*arguments, "0,1"]) == cli.OK
    assert runs.calls[0][2]["devices"] == [0, 1]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main([*arguments, "0"]) == cli.USAGE_ERROR
    assert "no usable CUDA GPU; use --gpu cpu" in capsys.readouterr().err


def test_failures_of_the_run_have_exit_code_1_and_no_traceback(
    here: Path, runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "c.yaml", "--train", "prompt=x"]
    runs.outcome = ValueError("no model in folder x; give another one")
    assert cli.main(arguments) == cli.RUN_FAILED
    assert capsys.readouterr().err == "error: no model in folder x; give another one\n"
    runs.outcome = RuntimeError("broken")
    assert cli.main(arguments) == cli.RUN_FAILED
    assert capsys.readouterr().err == "error: RuntimeError: broken\n(--verbose prints the traceback)\n"
    assert cli.main([*arguments, "--verbose"]) == cli.RUN_FAILED
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_exit_code_of_an_interrupt_names_the_signal(here: Path, runs: FakeRuns) -> None:
    arguments = ["--config", "c.yaml", "--train", "prompt=x"]
    runs.outcome = KeyboardInterrupt()
    assert cli.main(arguments) == cli.INTERRUPTED == 130
    runs.outcome = SignalReceived(signal.SIGTERM)
    assert cli.main(arguments) == 143
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        runs.outcome = types.SimpleNamespace(interrupted=True, error="stopped", signal=number)
        assert cli.main(arguments) == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_outside_a_run_end_the_command(
    here: Path, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setattr(runs, "run_training", lambda *_, **__: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert cli.main(["--config", "c.yaml", "--train", "prompt=x"]) == code
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_allowed_changes_are_keys_that_need_it(runs: FakeRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--train", "--resume", "x", "--allow-change", "system.loss"]) == cli.USAGE_ERROR
    assert "--allow-change: 'system.loss' is not one of seed, prompt, trainer.max_steps" in capsys.readouterr().err
    assert cli.main(["--config", "c.yaml", "--train", "--allow-change", "seed"]) == cli.USAGE_ERROR
    assert "applies to --train --resume RUN only" in capsys.readouterr().err


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
