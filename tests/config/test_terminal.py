"""Text reaches terminals and pipes of any encoding, width and patience."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scoredist3d.config.validation import load_experiment, to_yaml
from scoredist3d.terminal import display_width, fit_width
from scoredist3d.training.console import Console

ROOT = Path(__file__).resolve().parents[2]
FAST = str(ROOT / "configs" / "fast.yaml")


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=600, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--list", "guidance"], ["--describe", "geometry/implicit-volume"]])
def test_a_reader_that_leaves_causes_no_traceback(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # the reader is gone before the first line, as `| head -0` may be
    try:
        command = [sys.executable, str(ROOT / "launch.py"), *arguments]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=600, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_console_without_a_reader_goes_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        console = Console(stream)
        console.say("nobody hears this")
        console.progress("nor this")
        assert console.quiet and not console.due()


@pytest.mark.parametrize("prompt", ["une tasse à café", "赤いマグカップ", "a mug \N{ROCKET}"])
def test_any_prompt_reaches_an_ascii_terminal_and_a_utf8_one(prompt: str) -> None:
    arguments = ["--config", FAST, "--train", "--dry-run", "--anyway", f"prompt={prompt}"]
    ascii_only = launch(*arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert ascii_only.returncode == 0, ascii_only.stderr
    assert ascii(prompt)[1:-1] in ascii_only.stdout.decode("ascii")
    utf8 = launch(*arguments, PYTHONIOENCODING="utf-8", PYTHONUTF8="1")
    assert f"prompt: {prompt}\n" in utf8.stdout.decode() or f'prompt: "{prompt}"\n' in utf8.stdout.decode()


def test_bytes_that_are_no_text_are_refused_by_name() -> None:
    done = launch("--config", FAST, "--dry-run", os.fsdecode(b"prompt=\xff"), PYTHONUTF8="1")
    assert done.returncode == 2 and b"is not valid text in this terminal's encoding" in done.stderr


def test_the_progress_line_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.interactive = True
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((10, 24)))
    console.progress("step 赤いマグカップ")
    console.progress("ok")
    first, second = stream.getvalue().lstrip("\r").split("\r")
    assert first == "step 赤い" and display_width(first) == 9
    assert second == "ok" + " " * 7  # clears what the longer line left


def test_widths() -> None:
    assert display_width("abc") == 3
    assert display_width("e\N{COMBINING ACUTE ACCENT}") == 1
    assert display_width("赤い") == 4
    assert fit_width("赤い", 3) == "赤"
    assert fit_width("abc", 3) == "abc"


@pytest.mark.parametrize(
    "prompt",
    ['a "red" mug', "it's a mug", '"quoted"', '"one" and "two"', "costs $5", "${x} \\${y}", "50% off #1: a, b"],
)
def test_a_prompt_is_kept_as_typed(prompt: str, tmp_path: Path) -> None:
    config = load_experiment([FAST], [f"prompt={prompt}"])
    assert config.prompt == ("quoted" if prompt == '"quoted"' else prompt)
    saved = tmp_path / "resolved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_experiment([saved]).prompt == config.prompt


@pytest.mark.parametrize("prompt", ['a "red" $5 mug', "it's ${HOME} `ls`", "a mug"])
def test_make_demo_passes_any_prompt_on(prompt: str, tmp_path: Path) -> None:
    """The demo recipe of the Makefile, without the installation, and with a program that prints its arguments."""
    makefile = (ROOT / "Makefile").read_text().replace("demo: install\n", "demo:\n")
    (tmp_path / "Makefile").write_text(makefile)
    (tmp_path / "launch.py").write_text("import sys; print(sys.argv[1:])")
    command = ["make", "--silent", "demo", f"PY={sys.executable}", f"PROMPT={prompt}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == str(["--config", "configs/quickstart.yaml", "--train", f"prompt={prompt}"])
