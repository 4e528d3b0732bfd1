"""One server process for all faults, and the undisturbed runs."""

from collections.abc import Callable, Iterator

import pytest
from shared.fault_cases import FaultCase
from shared.fault_client import FaultServer


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
