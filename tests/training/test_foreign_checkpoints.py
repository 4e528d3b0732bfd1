"""Checkpoints of other programs, or edited by hand, are one message for each command, and the run stays as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shared.tiny_runs import plain

from scoredist3d import cli
from scoredist3d.files import read_json
from scoredist3d.training.checkpoint import read_checkpoint, write_checkpoint

Edit = Callable[[dict[str, Any]], Any]


def put(name: str, value: Any) -> Edit:
    return lambda state: state.__setitem__(name, value)


def put_weight(name: Any, value: Any) -> Edit:
    return lambda state: state["state_dict"].__setitem__(name, value)


def drop(name: str) -> Edit:
    return lambda state: state.pop(name)


def other_callbacks(state: dict[str, Any]) -> None:
    state["callbacks"] = {name: {"other": 1} for name in state["callbacks"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "c.yaml").write_text(yaml.safe_dump(plain(folder / "out", "text-to-2d", trainer={"max_steps": 1})))
    assert cli.main(["--config", str(folder / "c.yaml"), "--train", "--gpu", "cpu"]) == cli.OK
    (run,) = (folder / "out").glob("*/*")
    return run


@pytest.fixture
def edited(trained: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """Function that edits the checkpoint of a copy of the run."""

    def edit(change: Edit) -> Path:
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        state = read_checkpoint(run / "ckpts" / "last.ckpt")
        change(state)
        for path in (run / "ckpts").glob("*.ckpt"):
            write_checkpoint(state, path)
        return run

    return edit


def message(capsys: pytest.CaptureFixture[str], code: int) -> str:
    out, err = capsys.readouterr()
    assert code in (cli.RUN_FAILED, cli.USAGE_ERROR) and "Traceback" not in out + err and "--verbose" not in err
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and len(line) <= 507
    return line


NO_WEIGHTS = "is damaged or was written by another program: its entry state_dict is missing or has the wrong type"
NO_STEPS = "is damaged: it has no number of steps"
WEIGHTS = [
    (drop("state_dict"), NO_WEIGHTS),
    (put("state_dict", [1, 2]), NO_WEIGHTS),
    (put_weight(5, 6), NO_WEIGHTS),
    (put("state_dict", {}), "the checkpoint belongs to another configuration"),
    (put_weight("canvas.values", "text"), "the checkpoint belongs to another configuration"),
    (drop("global_step"), NO_STEPS),
    (put("global_step", "5"), NO_STEPS),
    (put("global_step", True), NO_STEPS),
    (put("global_step", -1), NO_STEPS),
]


@pytest.mark.parametrize("mode", ["validate", "test", "export", "train"])
@pytest.mark.parametrize(("change", "said"), WEIGHTS)
def test_a_foreign_state_is_one_message(
    edited: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], change: Edit, said: str, mode: str
) -> None:
    run = edited(change)
    summary = read_json(run / "summary.json")
    capsys.readouterr()
    arguments = ["--train", "--resume", str(run), "trainer.max_steps=2"] if mode == "train" else [f"--{mode}", str(run)]
    line = message(capsys, cli.main([*arguments, "--gpu", "cpu"]))
    assert said in line
    assert read_json(run / "summary.json") == summary


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("optimizer_states"), "its entry optimizer_states is missing or has the wrong type"),
        (drop("loops"), "its entry loops is missing or has the wrong type"),
        (put("loops", {}), "cannot be restored (KeyError: 'fit_loop')"),
        (put("loops", {"fit_loop": {"state_dict": {}}}), "its loops are not those of its step"),
        (put("loops", {"fit_loop": {"epoch_loop.batch_progress": 5}}), "cannot be restored"),
        (put("callbacks", 5), "its entry callbacks is missing or has the wrong type"),
        (other_callbacks, "cannot be restored (KeyError: 'window'); use another checkpoint"),
        (put("optimizer_states", [{"state": {}}]), "cannot be restored"),
    ],
)
def test_a_foreign_state_of_training_is_one_message(
    edited: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], change: Edit, said: str
) -> None:
    run = edited(change)
    capsys.readouterr()
    code = cli.main(["--train", "--resume", str(run), "trainer.max_steps=2", "--gpu", "cpu"])
    assert said in message(capsys, code)
    assert cli.main(["--validate", str(run), "--gpu", "cpu"]) == cli.OK  # its weights are good


def test_a_run_that_starts_from_a_foreign_checkpoint_is_one_message(
    edited: Callable[[Edit], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = plain(tmp_path / "out")
    config["system"]["init_from"] = str(edited(drop("state_dict")))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    code = cli.main(["--config", str(tmp_path / "c.yaml"), "--train", "--gpu", "cpu"])
    assert NO_WEIGHTS in message(capsys, code)


def test_a_message_is_short_and_printable_whatever_it_quotes(
    edited: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal would obey an escape sequence in the name of a weight."""
    run = edited(put_weight("\x1b]0;title\x07" + "x" * 10**5, torch.zeros(1)))
    capsys.readouterr()
    assert cli.main(["--validate", str(run), "--gpu", "cpu"]) == cli.RUN_FAILED
    line = capsys.readouterr().err.strip()
    assert "\x1b" not in line and r"unexpected: \x1b]0;title\x07xxx" in line
    assert line.endswith("configs/resolved.yaml in its run folder") and len(line) < 2100


def test_a_run_that_starts_from_a_run_with_another_config_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = plain(tmp_path / "out", trainer={"max_steps": 1})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["--config", str(tmp_path / "c.yaml"), "--train", "--gpu", "cpu"]) == cli.OK
    (run,) = (tmp_path / "out").glob("*/*")
    resolved = run / "configs" / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("num_levels: 3", "num_levels: 5"))
    config["system"]["init_from"] = str(run)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    code = cli.main(["--config", str(tmp_path / "c.yaml"), "--train", "--gpu", "cpu"])
    assert "the checkpoint of that run does not belong to its configs/resolved.yaml" in message(capsys, code)
