"""What the documents tell people to type does what it says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shared.custom_packages import forget_custom

from scoredist3d import cli, registry
from scoredist3d.config.pipeline import load_pipeline
from scoredist3d.config.validation import layers_to_yaml, load_experiment, parse_component, to_yaml
from scoredist3d.custom import load_custom
from scoredist3d.renderers import Render
from scoredist3d.seeding import Rng

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a page's shell blocks, with their comments; one that ends in a backslash goes on."""
    lines = "\n".join(blocks("sh", text)).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def arguments_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "custom/*.md", "scoredist3d/**/*.md")
    for path in ROOT.glob(pattern)
)
EVERY_COMMAND = [(page, command) for page in PAGES for command in commands((ROOT / page).read_text(encoding="utf-8"))]
OF_THE_PROGRAM = [
    (page, command)
    for page, command in EVERY_COMMAND
    if arguments_of(command)[:2] == ["python", "launch.py"] or arguments_of(command)[0] == "scoredist3d"
]
OF_SCRIPTS = sorted(
    {
        (page, match)
        for page in PAGES
        for match in re.findall(
            r"python ((?:benchmarks|scripts)/\w+\.py[^`\n]*)", (ROOT / page).read_text(encoding="utf-8")
        )
    }
)
COMMANDS = [command for page, command in OF_THE_PROGRAM if page == "docs/configuration.md"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a finished run of each first recipe and the custom component of the page."""
    monkeypatch.chdir(tmp_path)
    prompt, name = ["prompt=a red mug"], "a-red-mug@20260101-120000"
    pipeline = load_pipeline([ROOT / "configs" / "quickstart.yaml"], prompt)
    folder = tmp_path / "outputs" / "quickstart" / name
    runs = {folder / stage: config for stage, config in pipeline.stages.items()}
    runs[tmp_path / "outputs" / "fast" / name] = load_experiment([ROOT / "configs" / "fast.yaml"], prompt)
    for run, config in runs.items():
        (run / "configs").mkdir(parents=True)
        (run / "ckpts").mkdir()
        (run / "ckpts" / "last.ckpt").write_bytes(b"state")
        (run / "configs" / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "pipeline.yaml").write_text(layers_to_yaml(pipeline.written), encoding="utf-8")
    (code,) = (block for block in blocks("python") if "@register" in block)
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "halo.py").write_text(code, encoding="utf-8")
    # The page says where a user package goes: beside launch.py, or in the folder that a run starts from.
    monkeypatch.setattr("scoredist3d.custom.checkout_root", lambda: tmp_path)
    yield tmp_path
    registry._entries["loss"].pop("halo", None)
    forget_custom()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(command: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, script, *arguments = arguments_of(command)
    assert (program, script) == ("python", "launch.py")
    if not {"--list", "--describe", "--dry-run"} & set(arguments):
        arguments.append("--dry-run")
    assert cli.main(arguments) == cli.OK
    captured = capsys.readouterr()
    assert "warning" not in captured.err and captured.out
    if "--dry-run" in arguments:
        shown = yaml.safe_load(captured.out)
        for override in [item for item in arguments if "=" in item and "null" not in item]:
            path, _, value = override.partition("=")
            found = shown
            for part in path.split("."):
                found = found[int(part)] if isinstance(found, list) else found[part]
            assert found == (value if path == "prompt" else yaml.safe_load(value))


@pytest.mark.parametrize(("page", "command"), [item for item in OF_THE_PROGRAM if item[1] not in COMMANDS])
def test_commands_of_other_pages_are_understood(
    page: str, command: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if page == "docs/add-a-method.md":
        pytest.skip("this page builds a component of its own: tests/guidance/test_add_a_method.py runs its commands")
    program, *arguments = arguments_of(command)
    if program == "python":
        assert arguments.pop(0) == "launch.py"
    if arguments != ["--version"] and not {"--list", "--describe", "--dry-run"} & set(arguments):
        arguments.append("--dry-run")
    try:
        assert cli.main(arguments) == cli.OK, capsys.readouterr().err
    except SystemExit as done:
        assert (arguments, done.code) == (["--version"], 0)


@pytest.mark.parametrize(("page", "command"), OF_SCRIPTS)
def test_scripts_know_the_options_that_the_pages_give_them(page: str, command: str) -> None:
    script, *arguments = shlex.split(command)
    sources = [ROOT / script, *(ROOT / script).parent.rglob("*.py")]
    defined = {name for path in sources for name in re.findall(r'"(--[^"]+)"', path.read_text(encoding="utf-8"))}
    patterns = [re.sub(r"\\\{.*?\\\}", r"[\\w-]+", re.escape(name)) for name in defined]  # f"--{stage}-minutes"
    flags = [flag for flag in arguments if flag.startswith("--")]
    unknown = [flag for flag in flags if not any(re.fullmatch(pattern, flag) for pattern in patterns)]
    assert unknown == [], f"{page}: {script} has no such option"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_commands_mean_the_same_in_every_shell(shell: str, tmp_path: Path) -> None:
    """Each command reaches its program with the arguments that it shows: no bracket is taken for a pattern."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed here; test_no_shell_expands_anything covers its patterns")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    lines, names = [], {arguments_of(command)[0] for _, command in EVERY_COMMAND} - {".", "source"}
    for name in sorted(names):
        function = name.replace("/", "_").replace(".", "_")
        lines.append(f'{function}() {{ printf "%s\\0" {shlex.quote(name)} "$@"; printf "\\n\\0"; }}')
    expected = []
    for _, command in EVERY_COMMAND:
        name, *arguments = arguments_of(command)
        if name in names:
            expected.append([name, *arguments])
            command = name.replace("/", "_").replace(".", "_") + command.removeprefix(name)
        lines.append(command)
    script = tmp_path / "commands"
    script.write_text("\n".join(["setopt interactivecomments" if shell == "zsh" else ":", "set -e", *lines]) + "\n")
    flags = ["-f"] if shell == "zsh" else ["--norc"]
    done = subprocess.run([program, *flags, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    received = [part.split("\0")[:-1] for part in done.stdout.split("\n\0")[:-1]]
    assert received == expected


@pytest.mark.parametrize(("page", "command"), EVERY_COMMAND)
def test_no_shell_expands_anything(page: str, command: str) -> None:
    """Outside of quotes there is no character that a shell may expand; zsh stops at a pattern that matches nothing."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", re.sub(r"\s#.*", "", command))
    assert not set(bare) & set("[]{}*?!$~`()<>;&|^"), f"{page}: quote the argument, as in 'key=[1,2]'"


def test_the_make_targets_of_the_pages_exist() -> None:
    targets = {
        line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"^[a-z-]+:", line)
    }
    made = {arguments_of(command)[1] for _, command in EVERY_COMMAND if arguments_of(command)[0] == "make"}
    assert {"demo", "test"} <= made <= targets


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
    assert list(load_pipeline([folder / "magic3d.yaml"], ["prompt=x"]).stages) == ["coarse", "refine", "finish"]


def test_the_example_loss_computes_something(workplace: Path) -> None:
    assert load_custom([workplace / "custom"]) == []
    pixels = torch.tensor([0.1, 0.15, 0.9, 1.0]).view(1, 2, 2, 1)
    black = torch.zeros(1, 2, 2, 3)
    render = Render(rgb=black, opacity=pixels, depth=torch.zeros_like(pixels), background=black)
    loss = registry.build(parse_component("loss", {"type": "halo"}))
    assert float(loss(render, None, 0, Rng())) == pytest.approx(0.25 / 4)


@pytest.mark.slow
def test_the_example_in_python_trains() -> None:
    (example,) = (block for block in blocks("python") if "fit(system" in block)
    assert "steps=600" in example
    names: dict[str, Any] = {}
    small = 'radius=1.0, grid={"num_levels": 2, "log2_hashmap_size": 8}), renderer=VolumeRenderer.Config(num_samples=8'
    example = example.replace("steps=600", "steps=1").replace("=64", "=16").replace("radius=1.0", small)
    exec("from scoredist3d.renderers.volume import VolumeRenderer\n" + example, names)
    assert names["config"].loss["sparsity"].weight(600) == pytest.approx(0.1)
    assert names["system"].prompts.prompt == "a red mug"


@pytest.mark.slow
def test_the_python_example_of_the_readme_trains() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "steps=320" in example
    names: dict[str, Any] = {}
    exec(example.replace("steps=320", "steps=1"), names)
    assert names["config"].guidance.guidance_scale(0) == 5
    assert all(p.grad is not None for p in names["system"].geometry.parameters())


def test_null_takes_a_loss_out(workplace: Path) -> None:
    fast = [ROOT / "configs" / "fast.yaml"]
    assert "sparsity" in load_experiment(fast, ["prompt=x"]).system.loss
    assert "sparsity" not in load_experiment(fast, ["prompt=x", "system.loss.sparsity=null"]).system.loss
