"""The wheel works where there is no checkout: recipes, assets, commands, and a whole run in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A few steps at a small size in both stages: the path of the quickstart, not its quality.
SHORT = [
    "trainer.max_steps=4",
    "preview.every_n_steps=0",
    "test.frames=2",
    "test.width=32",
    "test.height=32",
    "exporter.resolution=48",
    "exporter.max_faces=1000",
    "exporter.texture_size=256",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, as `pip wheel .` does, without network."""
    pytest.importorskip("hatchling", reason="the build backend is not installed (requirements-dev.txt)")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__", ".*_cache", "dist", "build", ".whl")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    subprocess.run([*command, str(folder), str(source)], capture_output=True, timeout=600, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that has this wheel, and the dependencies of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], timeout=600, check=True)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = folder / scripts / "python"
    probe = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, timeout=600, check=True)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    Path(done.stdout.strip(), "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, capture_output=True, timeout=600, check=True)
    return python


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; child processes do not find the sources that are being tested on PYTHONPATH."""
    monkeypatch.chdir(tmp_path)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"scoredist3d/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "scoredist3d").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert recipes | package <= names
    others = {name for name in names - recipes - package if ".dist-info/" not in name}
    assert others == set(), "files that do not belong into the package"


def test_the_commands_that_show_something(python: Path, empty: Path) -> None:
    program = python.parent / "scoredist3d"
    location = run(python, "-c", "import scoredist3d; print(scoredist3d.__file__)")
    assert Path(location.strip()).is_relative_to(python.parents[1]), "the wheel, not the checkout"
    assert run(program, "--version").startswith("scoredist3d ")
    assert run(program, "--list") == run(python, "-m", "scoredist3d", "--list")
    assert "guidance_scale" in run(program, "--describe", "guidance/sds")
    for recipe in ("quickstart.yaml", "configs/pipeline/sketch-shape.yaml"):
        assert "prompt: a red mug" in run(program, "--config", recipe, "--train", "--dry-run", "prompt=a red mug")
    assert "usage: scoredist3d --config" in run(program, "--help")
    assert list(empty.iterdir()) == []


def test_a_whole_run(python: Path, empty: Path) -> None:
    program = python.parent / "scoredist3d"
    said = run(program, "--config", "configs/quickstart.yaml", "--train", "prompt=a red mug", "--gpu", "cpu", *SHORT)
    assert "launch.py" not in said
    (folder,) = (empty / "outputs" / "quickstart").iterdir()
    (glb,) = (folder / "refine" / "export").glob("*.glb")
    assert glb.read_bytes()[:4] == b"glTF"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["prompt"] == "a red mug"
    assert [summary["stages"][stage]["step"] for stage in ("coarse", "refine")] == [4, 4]
    assert any((folder / "refine" / "videos").iterdir()) and not (folder / "coarse" / "videos").exists()
    longer = ["--train", "--resume", "outputs/quickstart", "stages.refine.trainer.max_steps=6"]
    for command in (["--export", str(folder)], longer):
        glb.unlink()
        run(program, *command, "--gpu", "cpu")
        assert glb.is_file()
    stages = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["stages"]
    assert {name: stage["step"] for name, stage in stages.items()} == {"coarse": 4, "refine": 6}


def test_several_processes_find_the_package_wherever_they_start(empty: Path) -> None:
    """The same for a checkout: `python /path/to/launch.py` from another folder, on two processes."""
    arguments = ["--config", "configs/quickstart.yaml", "--train", "prompt=a red mug", "--gpu", "cpu:2", *SHORT]
    said = run(Path(sys.executable), str(ROOT / "launch.py"), *arguments, "trainer.max_steps=2")
    assert "Done:" in said
