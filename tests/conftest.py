"""Shared test set-up: sleeping OpenMP threads, offline hubs, markers that skip with a reason, a watch on global state.

No test may draw from the global random streams of torch, numpy or ``random``, nor may the code that it runs: all
randomness comes from generators that are passed on. A test whose set-up or body moves one of the streams fails. Code
of other libraries that can draw from nothing else (the initial weights of ``torch.nn`` modules) runs inside of
``torch.random.fork_rng``, or on the meta device.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "120"  # what is printed must not depend on the width of the terminal
# Child processes import these sources, wherever the tests were started.
_ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
# Lightning imports rich where it is installed, and rich.style draws from ``random`` when it is first imported. This
# import keeps that draw out of the first test that trains.
with contextlib.suppress(ImportError):
    import rich.style  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    before = _streams()
    result = yield
    _assert_untouched(before, "set-up")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    before = _streams()
    result = yield
    _assert_untouched(before, "test")
    return result


def _streams() -> dict[str, Any]:
    """States of the global random streams, comparable with ``==``."""
    import numpy as np
    import torch

    _, keys, position, *_ = np.random.get_state()
    return {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "numpy": (keys.tobytes(), position),  # type: ignore[union-attr]
        "random": random.getstate(),
    }


def _assert_untouched(before: dict[str, Any], what: str) -> None:
    after = _streams()
    moved = [name for name, state in before.items() if after[name] != state]
    if moved:
        pytest.fail(f"the {what} drew from the global random stream of {', '.join(moved)}", pytrace=False)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """One thread for torch, here and in child processes: sums are then added in the same order in all of them."""
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
