"""Low-rank adapters (LoRA, arXiv 2106.09685) of a prior, which are added to its weights when they are loaded."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.config import Block, option
from scoredist3d.config.errors import brief
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.model_files import first_line, read_weights, weight_file
from scoredist3d.priors.quiet import quiet_libraries

_READERS = {
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "AuraFlowTransformer2DModel": "AuraFlowLoraLoaderMixin",
}
"""Classes of ``diffusers.loaders`` that convert the names in LoRA files, by the class of the denoising network."""
_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
"""Entry of the header of a file that diffusers wrote: rank and alpha of each network."""
_WEIGHT = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.(weight|bias)")
_NAME = re.compile(r"(?:\w|\\?\.)+")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")
_OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "magnitude_vector": "DoRA", "oft_": "OFT"}


@dataclass
class LoraOptions(Block):
    """One LoRA and its weight."""

    path: str = option(help="A .safetensors file, a folder, or a hub id owner/model.")
    weight: float = option(1.0, "Factor of the LoRA's change of the weights.", ge=-100, le=100)
    file: str | None = option(None, f"Name of the file in the folder or repository; null is {_FILE}.")


@dataclass
class _Change:
    """The change of one layer: ``scale`` times ``up @ down``, and that of the bias."""

    scale: float = 1.0
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Lora:
    """A LoRA that was read from a file, with the names of diffusers.

    Attributes:
        name: The file.
        key: Configuration key that holds its name, for error messages.
        weight: Factor of all changes.
        changes: The changes of the layers by the name of the network in the pipeline's index and that of the layer.
    """

    name: str
    key: str
    weight: float
    changes: Mapping[str, Mapping[str, _Change]] = field(repr=False)

    @classmethod
    def read(cls, options: LoraOptions, source: PipelineSource, key: str) -> Lora:
        """Read a file for the model of ``source``.

        Args:
            options: The file and its weight.
            source: The pipeline, none of whose weights are read.
            key: Configuration key that holds the options, for error messages.

        Raises:
            PriorError: The file is missing, damaged, of another kind, or for other networks.
        """
        path = weight_file(options.path, options.file, _FILE, key)
        tensors, header = read_weights(path, key)
        other = next((kind for part, kind in _OTHER_KINDS.items() if any(part in name for name in tensors)), None)
        if other is not None:
            raise PriorError(f"{key}: {path} is a {other}, which is not supported; use a LoRA")
        try:
            with quiet_libraries():
                converted = _converted(_with_plain_alpha(tensors), source, key)
            return cls(str(path), key, options.weight, _changes(converted, _metadata(header), source, f"{key}: {path}"))
        except PriorError:
            raise
        except Exception as error:  # files from others can make the converters fail in every way
            raise PriorError(
                f"{key}: {path} is not a LoRA for {source.name}: {first_line(error, all_lines=True)}; use one of the "
                "same base model"
            ) from error

    @torch.no_grad()
    def apply(self, part: str, network: nn.Module) -> None:
        """Add the changes of one network to its weights.

        Args:
            part: Name of the network in the index.
            network: The network.

        Raises:
            PriorError: The network has no such layer, or one of another shape.
        """
        layers = dict(network.named_modules())
        for name, change in self.changes.get(part, {}).items():
            if not hasattr(network, "text_model"):  # transformers has removed this level of CLIP's text encoder
                name = name.removeprefix("text_model.")
            layer = layers.get(name)
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor) or not isinstance(layer, nn.Linear | nn.Conv2d):
                raise self._misfit(f"it changes {name}, which the {part} of the model does not have as a layer")
            delta = _product(change)
            if delta is None or delta.shape != weight.shape:
                found = "incomplete" if delta is None else f"of shape {tuple(delta.shape)}"
                raise self._misfit(
                    f"its change of {name} is {found}, and that layer of the {part} has shape {tuple(weight.shape)}"
                )
            weight += (self.weight * change.scale * delta).to(weight.dtype)
            if change.bias is not None and layer.bias is not None:
                layer.bias += (self.weight * change.scale * change.bias.float()).to(layer.bias.dtype)

    def _misfit(self, problem: str) -> PriorError:
        return PriorError(f"{self.key}: {self.name} does not fit: {problem}; use a LoRA of the same base model")


def read_loras(given: str | Sequence[str | LoraOptions] | None, source: PipelineSource) -> tuple[Lora, ...]:
    """The LoRAs of the option ``prior.lora``.

    Raises:
        PriorError: A file cannot be used; see :meth:`Lora.read`.
    """
    items = [given] if isinstance(given, str) else list(given or ())
    options = [LoraOptions(path=item) if isinstance(item, str) else item for item in items]
    return tuple(Lora.read(each, source, "prior.lora") for each in options)


def _with_plain_alpha(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the ratio of alpha and rank multiplied into the second factors, in float32.

    Each alpha becomes the rank. So the converters, which treat alpha differently, need not be asked for it.
    """
    result = dict(tensors)
    for name in [name for name in tensors if name.endswith(".alpha")]:
        module = name.removesuffix(".alpha")
        up = next((module + suffix for suffix in _UP if module + suffix in result), None)
        if up is not None and result[up].ndim > 1 and tensors[name].numel() == 1:
            rank = result[up].shape[1]
            result[up] = result[up].float() * (tensors[name].float().item() / rank)
            result[name] = torch.tensor(float(rank))
    return result


def _converted(tensors: dict[str, Tensor], source: PipelineSource, key: str) -> dict[str, Tensor]:
    """The tensors with the names of the layers in diffusers after the names of the networks."""
    from diffusers import loaders

    part = next((name for name in ("unet", "transformer") if source.has(name)), "unet")
    reader = _READERS.get(str(source.index.get(part, ["", ""])[1]))
    if reader is None:
        raise PriorError(f"{key}: diffusers reads no LoRA for the pipeline of {source.name}; remove the option")
    keywords: dict[str, Any] = {}
    if reader == "StableDiffusionLoraLoaderMixin" and source.has("text_encoder_2"):
        reader = "StableDiffusionXLLoraLoaderMixin"
        keywords["unet_config"] = SimpleNamespace(layers_per_block=source.network_config(part).get("layers_per_block"))
    result = getattr(loaders, reader).lora_state_dict(tensors, **keywords)
    return dict(result[0] if isinstance(result, tuple) else result)


def _changes(
    tensors: dict[str, Tensor], metadata: dict[str, Any], source: PipelineSource, where: str
) -> dict[str, dict[str, _Change]]:
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    changes: dict[str, dict[str, _Change]] = {}
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if not source.has(part) or part == "vae":
            raise PriorError(f"{where} has the unknown key {brief(name, 100)}; use a LoRA for {source.name}")
        groups[part][rest] = tensor
    for part, group in groups.items():
        if not any(".lora_A" in name for name in group):
            if part.startswith("text_encoder"):
                group = convert_state_dict_to_peft(convert_state_dict_to_diffusers(group))
            else:
                group = convert_unet_state_dict_to_peft(group)
        found: dict[str, _Change] = defaultdict(_Change)
        changes[part] = found
        for name, tensor in group.items():
            match = _WEIGHT.fullmatch(name)
            if match is None:
                if name.endswith(".alpha"):
                    continue  # the rank; see _with_plain_alpha
                raise PriorError(f"{where} has the unknown key {part}.{brief(name, 100)}; use a LoRA without others")
            layer, factor, kind = match.groups()
            setattr(found[layer], "bias" if kind == "bias" else {"A": "down", "B": "up"}[factor], tensor)
        for layer, change in found.items():
            change.scale = _scale(metadata, part, layer, change, where)
    if not changes:
        raise PriorError(f"{where} contains no weights; use a LoRA")
    return changes


def _scale(metadata: dict[str, Any], part: str, layer: str, change: _Change, where: str) -> float:
    """Alpha divided by the rank, or by its root, as the header of a file of diffusers says; otherwise 1."""
    if f"{part}.lora_alpha" not in metadata or change.down is None:
        return 1.0
    alpha = metadata[f"{part}.lora_alpha"]
    for pattern, value in (metadata.get(f"{part}.alpha_pattern") or {}).items():
        # In peft, patterns are regular expressions for the end of the name. Untrusted ones can take years to match.
        if not _NAME.fullmatch(pattern):
            raise PriorError(f"{where} has the pattern {brief(pattern, 100)} in its header; use names of layers")
        if f".{layer}".endswith("." + pattern.replace("\\.", ".")):
            alpha = value
            break
    rank = len(change.down)
    return float(alpha) / (math.sqrt(rank) if metadata.get(f"{part}.use_rslora") else rank)


def _metadata(header: Mapping[str, str]) -> dict[str, Any]:
    content = json.loads(header.get(_METADATA) or "{}")
    return content if isinstance(content, dict) else {}


def _product(change: _Change) -> Tensor | None:
    """The product of both factors in float32, in the shape of the layer's weight; None if one is missing."""
    if change.down is None or change.up is None or change.up.shape[1] != change.down.shape[0]:
        return None
    down, up = change.down.float(), change.up.float()
    if down.ndim == 4:
        return functional.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    return up @ down
