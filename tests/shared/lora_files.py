"""LoRA files of random numbers for the networks of toy pipelines, in the formats that are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 2
Factors = tuple[Tensor, Tensor]


def factors(network: nn.Module, wanted: Callable[[str], bool], seed: int = 0) -> dict[str, Factors]:
    """Random factors (down, up) for the linear layers and convolutions of a network whose names are wanted."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and wanted(name):
            shape = layer.weight.shape
            down = torch.randn(RANK, *shape[1:], generator=generator)
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
            found[name] = (0.3 * down, 0.3 * up)
    assert found
    return found


def in_attention(name: str) -> bool:
    """Whether a layer is a projection of an attention layer, in diffusers or CLIP."""
    return name.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"))


def write_diffusers(
    path: Path,
    parts: Mapping[str, Mapping[str, Factors]],
    metadata: Mapping[str, Any] | None = None,
    **others: Tensor,
) -> Path:
    """Write a file in the format of diffusers and peft: ``unet.LAYER.lora_A.weight``."""
    tensors = dict(others)
    for part, layers in parts.items():
        for name, (down, up) in layers.items():
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    return path


def write_kohya(path: Path, parts: Mapping[str, Mapping[str, Factors]], alpha: Sequence[float]) -> Path:
    """Write a file in the format of kohya: ``lora_unet_LAYER.lora_down.weight``, with alternating alphas."""
    tensors = {}
    for part, layers in parts.items():
        for index, (name, (down, up)) in enumerate(layers.items()):
            module = f"{part}_{name.replace('.', '_')}"
            tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            tensors[f"{module}.alpha"] = torch.tensor(alpha[index % len(alpha)])
    save_file(tensors, path)
    return path


def fused(network: nn.Module, layers: Mapping[str, Factors], scale: float | Sequence[float]) -> None:
    """Add ``scale`` (up @ down) to the layers of a network, computed by hand; several scales alternate."""
    scales = [scale] if isinstance(scale, float) else scale
    with torch.no_grad():
        for index, (name, (down, up)) in enumerate(layers.items()):
            weight = network.get_submodule(name).weight
            change = torch.einsum("or,r...->o...", up.flatten(1), down)
            weight += scales[index % len(scales)] * change
