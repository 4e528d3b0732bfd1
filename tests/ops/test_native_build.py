"""Building the C kernels: cache, fallback flags, concurrent processes, disabling."""

import ctypes
import os
import stat
import subprocess
import sys

import pytest

from scoredist3d.ops import native

needs_compiler = pytest.mark.skipif(not native._compilers(), reason="no C compiler")
load = native._load.__wrapped__


def test_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("SCOREDIST3D_NATIVE", "0")
    assert load() == (None, "disabled by SCOREDIST3D_NATIVE=0")


def test_no_compiler_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.delenv("SCOREDIST3D_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    library, reason = load()
    assert library is None and reason is not None and "no C compiler found" in reason


@needs_compiler
def test_a_compiler_that_refuses_flags_gets_plainer_ones(monkeypatch, tmp_path):
    """A stand-in for a compiler without OpenMP that does not know -march=native."""
    real = native._compilers()[0][0]
    wrapper = tmp_path / "picky-cc"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*|*-march=native*) exit 1;; esac\nexec {real} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv("SCOREDIST3D_NATIVE", raising=False)
    monkeypatch.setenv("CC", str(wrapper))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library, reason = load()
    assert reason is None and isinstance(library, ctypes.CDLL)
    assert [path.suffix for path in (tmp_path / "scoredist3d").iterdir()] == [".so"]


@needs_compiler
def test_a_failing_compiler_leaves_nothing_behind(monkeypatch, tmp_path):
    failing = [sys.executable, "-c", "import sys; sys.exit(1)"]
    monkeypatch.setattr(native, "_compilers", lambda: [failing])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SCOREDIST3D_NATIVE", raising=False)
    library, reason = load()
    assert library is None and reason is not None and "exit status 1" in reason
    assert list((tmp_path / "scoredist3d").iterdir()) == []


@needs_compiler
def test_two_processes_at_once(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("SCOREDIST3D_NATIVE", None)
    code = "from scoredist3d.ops import native; assert native.available(), native.unavailable_reason()"
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [child.wait(timeout=600) for child in children] == [0, 0]
    files = list((tmp_path / "scoredist3d").iterdir())
    assert len(files) == 1 and files[0].suffix == ".so"


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "half", "flipped bit"])
def test_a_damaged_library_is_built_again(tmp_path, damage):
    """In processes of their own, because loading a truncated library ends a process with a bus error."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("SCOREDIST3D_NATIVE", None)
    code = "from scoredist3d.ops import native; assert native.available(), native.unavailable_reason()"

    def run() -> str:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run() == ""
    (library,) = (tmp_path / "scoredist3d").iterdir()
    before = library.read_bytes()
    content = bytearray(before)
    if damage == "flipped bit":
        content[len(content) // 3] ^= 4
    else:
        del content[0 if damage == "empty" else len(content) // 2 :]
    library.write_bytes(content)
    assert run() == f"the cache file {library} is damaged (its checksum differs) and is regenerated\n"
    (again,) = (tmp_path / "scoredist3d").iterdir()
    assert (again.name, again.read_bytes()) == (library.name, before)
    assert run() == ""


def test_key_depends_on_flags():
    assert native._key(["cc", "-O2"]) != native._key(["cc", "-O3"])
