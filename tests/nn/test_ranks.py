"""Sums and means over ranks: alone, in a group of one process, and with another rank's values."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from scoredist3d.nn.ranks import average_over_ranks, sum_over_ranks


@pytest.fixture
def group(tmp_path: Path) -> Generator[None, None, None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_without_a_group_the_values_stay() -> None:
    values, tensors = torch.arange(3.0), [torch.ones(2), torch.zeros(1, 2)]
    assert torch.equal(sum_over_ranks(values), torch.arange(3.0))
    average_over_ranks(tensors)
    assert torch.equal(tensors[0], torch.ones(2)) and torch.equal(tensors[1], torch.zeros(1, 2))


def test_one_process_is_its_own_sum_and_mean(group: None) -> None:
    values, tensors = torch.arange(3.0), [torch.ones(2), torch.full((1, 2), 3.0)]
    assert torch.equal(sum_over_ranks(values), torch.arange(3.0))
    average_over_ranks(tensors)
    average_over_ranks([])
    assert torch.equal(tensors[0], torch.ones(2)) and torch.equal(tensors[1], torch.full((1, 2), 3.0))


def test_the_values_of_other_ranks_are_added_once(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank has ten times the values of this one."""
    calls: list[int] = []

    def all_reduce(tensor: Tensor) -> None:
        calls.append(tensor.numel())
        tensor.mul_(11.0)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    values = torch.arange(4.0).view(2, 2)
    found = sum_over_ranks(values)
    assert torch.equal(found, 11.0 * torch.arange(4.0).view(2, 2)) and found.data_ptr() == values.data_ptr()
    tensors = [torch.ones(2), torch.full((1, 2), 3.0)]
    average_over_ranks(tensors)
    assert torch.equal(tensors[0], torch.full((2,), 5.5)) and torch.equal(tensors[1], torch.full((1, 2), 16.5))
    assert calls == [4, 4]  # one reduction for all tensors of a mean
