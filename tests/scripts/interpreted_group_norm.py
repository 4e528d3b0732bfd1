"""Runs the kernels of the group normalization in Triton's interpreter and compares them with torch.

A script and not a test: the interpreter must be chosen before Triton is imported. test_acceleration.py runs it.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import torch
from prior_training.group_norm import group_norm
from torch.nn import functional


def compare(shape: tuple[int, ...], groups: int, activate: bool) -> None:
    """Output and gradients for one shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = (3 * torch.randn(shape, generator=generator) + 1.5).requires_grad_()
    weight, bias = (torch.randn(shape[1], generator=generator).requires_grad_() for _ in range(2))
    upstream = torch.randn(shape, generator=generator)
    expected = functional.group_norm(x, groups, weight, bias, 1e-5)
    expected = functional.silu(expected) if activate else expected
    found = group_norm(x, weight, bias, groups=groups, eps=1e-5, activate=activate)
    assert found.is_contiguous(memory_format=torch.channels_last)
    names = ("output", "gradient of x", "gradient of the weight", "gradient of the bias")
    results = [(y, *torch.autograd.grad((y * upstream).sum(), (x, weight, bias))) for y in (found, expected)]
    for name, a, b in zip(names, *results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{shape} {name}: {text}")
    print(f"{shape}, {groups} groups, activate={activate}: equal")


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare((2, 16, 24, 24), 8, True)  # several tiles of pixels
    compare((3, 24, 5, 7), 8, True)  # neither count is a power of two
    compare((2, 8, 4, 4), 2, False)
