"""The command line: options, what is called, exit codes and messages."""

from __future__ import annotations

import signal
import types
from pathlib import Path

import pytest
from shared.fake_runs import FakeRuns, make_run

from scoredist3d import cli
from scoredist3d.signals import SignalReceived

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
