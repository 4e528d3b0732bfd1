"""Frozen networks in the precision that suits their device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import nn

Precision = Literal["auto", "auto-bf16", "fp32", "fp16", "bf16"]
"""Precision of a network: auto and auto-bf16 are fp32 except on CUDA, where they are fp16 and bf16."""

_AUTOMATIC: dict[str, torch.dtype] = {"auto": torch.float16, "auto-bf16": torch.bfloat16}
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def loading_dtype(precision: Precision) -> torch.dtype:
    """Data type in which weights are loaded on the CPU; float32 for automatic precision."""
    return _DTYPES.get(precision, torch.float32)


class FrozenNetwork(nn.Module):
    """Base class of the parts of a prior that contain one network.

    With precision ``auto``, the network is in float16 on CUDA and in float32 elsewhere, with ``auto-bf16`` in bfloat16
    on CUDA; its data type changes when this module or a parent module moves to another device.

    Attributes:
        network: A diffusers or transformers model.
    """

    network: Any

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        """Args:
        network: A frozen network in evaluation mode.
        precision: Numerical precision of the network.
        """
        super().__init__()
        self.training = False
        self.network = network
        self._precision = precision

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type in which the network computes."""
        return self.network.dtype

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Cast the network after a move to another device, which may have been the move of a parent module."""
        super()._apply(fn, recurse)
        if self._precision in _AUTOMATIC:
            dtype = _AUTOMATIC[self._precision] if self.device.type == "cuda" else torch.float32
            if self.dtype != dtype:
                cast_network(self.network, dtype)
        return self


def cast_network(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network in place.

    Layers that overflow in float16 (T5's ``wo``) stay in float32, as when transformers loads such a network in half
    precision.
    """
    network.to(dtype)
    if dtype != torch.float16:
        return
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for path, module in network.named_modules():
        if kept.intersection(path.split(".")):
            module.float()
