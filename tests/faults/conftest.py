"""Small and read-only file systems, one server process for all faults, and the undisturbed runs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shared.fault_cases import FaultCase
from shared.fault_client import FaultServer
from shared.figures import FIGURES

Mount = Callable[..., Path]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.write_line("faults: " + ", ".join(f"{number:,} {kind}" for kind, number in FIGURES.items()))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Function that mounts a tmpfs with options such as ``size=64k`` and returns its folder."""
    if shutil.which("mount") is None:
        pytest.skip("there is no program `mount`")
    mounted: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def fault_server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture(scope="session")
def fault_case(fault_server: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FaultCase]:
    """A function that returns the case of a name, made once."""
    made: dict[tuple[str, str], FaultCase] = {}

    def case(name: str, devices: str = "cpu") -> FaultCase:
        if (name, devices) not in made:
            made[name, devices] = FaultCase(name, fault_server, tmp_path_factory.mktemp(name) / "case", devices)
        return made[name, devices]

    return case
