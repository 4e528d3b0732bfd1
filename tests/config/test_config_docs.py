"""What the documents tell people to type does what it says."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from scoredist3d import cli, registry
from scoredist3d.config.pipeline import load_pipeline
from scoredist3d.config.validation import load_experiment, parse_component, to_yaml
from scoredist3d.custom import load_custom
from scoredist3d.renderers import Render
from scoredist3d.seeding import Rng

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    lines = [line.split("   #")[0].strip() for block in blocks("sh", text) for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = commands(TEXT)
OTHER_PAGES = ("README.md", "docs/backends.md", "docs/methods.md", "docs/quickstart.md", "docs/representations.md")
OTHER_COMMANDS = [
    (page, command)
    for page in OTHER_PAGES
    for command in commands((ROOT / page).read_text(encoding="utf-8"))
    if not command.startswith("make ")
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with one finished run and the custom component of the page."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "quickstart" / "a-red-mug@20260101-120000"
    (run / "configs").mkdir(parents=True)
    (run / "ckpts").mkdir()
    (run / "ckpts" / "last.ckpt").write_bytes(b"state")
    config = load_experiment([ROOT / "configs" / "quickstart.yaml"], ["prompt=a red mug"])
    (run / "configs" / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    (code,) = blocks("python")
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "halo.py").write_text(code, encoding="utf-8")
    yield tmp_path
    registry._entries["loss"].pop("halo", None)
    for name in [name for name in sys.modules if name == "custom" or name.startswith("custom.")]:
        del sys.modules[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(command: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "launch.py")
    assert cli.main(arguments) == cli.OK
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out
    if "--dry-run" in arguments:
        shown = yaml.safe_load(captured.out)
        for override in [item for item in arguments if "=" in item and "null" not in item]:
            path, _, value = override.partition("=")
            found = shown
            for part in path.split("."):
                found = found[int(part)] if isinstance(found, list) else found[part]
            assert found == (value if path == "prompt" else yaml.safe_load(value))


@pytest.mark.parametrize(("page", "command"), OTHER_COMMANDS)
def test_commands_of_other_pages_are_understood(
    page: str, command: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = command.replace("quickstart/RUN", "quickstart/a-red-mug@20260101-120000")
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    if script != "launch.py":
        assert (ROOT / script).is_file()
        return
    if not {"--list", "--describe", "--dry-run"} & set(arguments):
        arguments.append("--dry-run")
    assert cli.main(arguments) == cli.OK, capsys.readouterr().err


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = {
        line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"^[a-z-]+:", line)
    }
    made = {line.split()[1] for line in commands((ROOT / "README.md").read_text()) if line.startswith("make ")}
    assert made and made <= targets


def test_the_example_file_is_valid(workplace: Path) -> None:
    (example,) = blocks("yaml")
    (workplace / "example.yaml").write_text(example, encoding="utf-8")
    config = load_experiment(["example.yaml"], ["prompt=a red mug"])
    assert config.system.guidance.guidance_scale(0) == 20.0
    assert config.system.loss["sparsity"].weight(600) == pytest.approx(0.1)


def test_the_example_pipeline_is_the_one_that_ships(tmp_path: Path) -> None:
    (example,) = blocks("yaml", (ROOT / "docs" / "representations.md").read_text(encoding="utf-8"))
    folder = ROOT / "configs" / "pipeline"
    assert yaml.safe_load(example) == yaml.safe_load((folder / "magic3d.yaml").read_text())
    assert list(load_pipeline([folder / "magic3d.yaml"], ["prompt=x"]).stages) == ["coarse", "refine"]


def test_the_example_loss_computes_something(workplace: Path) -> None:
    assert load_custom([workplace / "custom"]) == []
    pixels = torch.tensor([0.1, 0.15, 0.9, 1.0]).view(1, 2, 2, 1)
    black = torch.zeros(1, 2, 2, 3)
    render = Render(rgb=black, opacity=pixels, depth=torch.zeros_like(pixels), background=black)
    loss = registry.build(parse_component("loss", {"type": "halo"}))
    assert float(loss(render, None, 0, Rng())) == pytest.approx(0.25 / 4)


def test_null_takes_a_loss_out(workplace: Path) -> None:
    quickstart = [ROOT / "configs" / "quickstart.yaml"]
    assert "sparsity" in load_experiment(quickstart, ["prompt=x"]).system.loss
    assert "sparsity" not in load_experiment(quickstart, ["prompt=x", "system.loss.sparsity=null"]).system.loss
