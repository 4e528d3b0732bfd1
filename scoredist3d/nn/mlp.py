"""Small fully connected networks with seeded initialization."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """ReLU network ``widths[0] -> ... -> widths[-1]`` with biases and no activation at the end.

    Weights are drawn from U(-sqrt(6 / fan_in), sqrt(6 / fan_in)) (He initialization); biases are initially zero. All
    draws come from the given generator, whereas ``torch.nn.Linear`` would draw from the global random stream.
    """

    def __init__(self, widths: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            bound = math.sqrt(6.0 / fan_in)
            self.weights.append(torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=generator))
            self.biases.append(torch.zeros(fan_out))

    def forward(self, x: Tensor, *, num_outputs: int | None = None) -> Tensor:
        """(N, widths[0]) -> (N, widths[-1]), or only the first ``num_outputs`` columns, which is cheaper."""
        last = len(self.weights) - 1
        for index in range(last):
            # In place: the pre-activation is not needed again, and these thin layers are limited by memory bandwidth.
            x = F.linear(x, self.weights[index], self.biases[index]).relu_()
        return F.linear(x, self.weights[last][:num_outputs], self.biases[last][:num_outputs])
