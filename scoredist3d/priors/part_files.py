"""Checks of the files of a local model folder before diffusers or transformers read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scoredist3d.limits import MAX_JSON_BYTES, check_file_size
from scoredist3d.priors.quiet import quiet_libraries
from scoredist3d.tensor_files import LOADING_ERRORS, check_tensor_file

MAX_SMALL_NUMBER = 1_000_000
"""Numbers up to this one, such as sizes of vocabularies, may be in the configuration of a network of any size."""
_PART_BASES = {
    "diffusers.ModelMixin",
    "diffusers.SchedulerMixin",
    "transformers.PreTrainedModel",
    "transformers.PreTrainedTokenizerBase",
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_part(folder: Path, cls: Any = None, *, allow_pickle: bool = False, option: str = "") -> None:
    """Check the files in the folder of one part of a pipeline.

    Args:
        folder: The folder of the part, e.g. ``unet``.
        cls: The class that loads it, if it is one of diffusers.
        allow_pickle: Whether pickled weights may be read.
        option: The configuration key that allows them, for the error message.

    Raises:
        ValueError: A JSON file is too large, the index of the weights names other files than weights in this folder,
            the part is an adapter for another model, its configuration describes a larger network than the weights,
            or pickled weights are damaged or not allowed.
    """
    for path in sorted(folder.glob("*.json")):
        check_file_size(path, MAX_JSON_BYTES, "a JSON file of a model")
    path = folder / "config.json"
    config = read_json_file(path) if path.is_file() else None
    _check_implementations(config)
    if (folder / "adapter_config.json").exists():
        # transformers would load the base model that it names, from anywhere.
        raise ValueError("adapter_config.json makes it an adapter for another model; merge the adapter into its model")
    suffixes = (".safetensors", ".bin") if allow_pickle else (".safetensors",)
    for path in sorted(folder.glob("*.index*.json")):
        if path.name.startswith(("pytorch_model.bin", "diffusion_pytorch_model.bin")) and not allow_pickle:
            continue
        for name in _weight_files(path):
            if Path(name).name != name or not name.endswith(suffixes):
                raise ValueError(
                    f"{path.name} names the file {name!r}; it may only name {suffixes[0]} files next to it"
                )
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles and not allow_pickle and not any(folder.glob("*.safetensors")):
        hint = f", or set {option}=true" if option else ""
        raise ValueError(f"its weights are a pickle, {pickles[0].name}; convert them to safetensors{hint}")
    for path in pickles if allow_pickle else ():
        try:
            check_tensor_file(path)
        except LOADING_ERRORS as error:
            raise ValueError(f"{path.name} is not a file of plain tensors: {error}") from error
    if config is not None:
        _check_layers(folder, config)
        _check_widths(folder, config, cls)


def read_json_file(path: Path) -> Any:
    """The content of a JSON file of a model folder.

    Raises:
        ValueError: The file is too large, nested too deeply, not UTF-8 or not JSON.
    """
    check_file_size(path, MAX_JSON_BYTES, "a JSON file of a model")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None


def is_part_class(cls: Any) -> bool:
    """Whether a class is a concrete model, tokenizer or scheduler.

    Classes that choose another class by the content of a folder (pipelines, ``AutoModel``) could run the folder's code.
    """
    if not isinstance(cls, type):
        return False
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in cls.__mro__[1:]}
    return not bases.isdisjoint(_PART_BASES)


def _check_implementations(config: Any) -> None:
    """Check that ``config.json`` names no implementation of attention or experts from the hub, which is code."""
    for key, name in _items(config):
        if isinstance(name, str) and "/" in name and "_implementation" in key:
            raise ValueError(f"config.json has {key}={name!r}, which is code from the hub; remove this key")


def _check_layers(folder: Path, config: Any) -> None:
    """Check that the numbers of layers in ``config.json`` do not exceed the number of weights, and others their bytes.

    The libraries would build the layers, which may take for ever, before they miss the weights.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return
    counts = [_count_tensors(file) for file in files]
    if None in counts:
        return  # The libraries refuse the damaged file.
    weights = sum(count or 0 for count in counts)
    check_numbers(config, weights, sum(file.stat().st_size for file in files))


def check_numbers(config: Any, weights: int, size: int) -> None:
    """Check the numbers of layers and other numbers in the decoded ``config.json`` of a network.

    Args:
        config: The configuration.
        weights: Number of the weights, which the number of layers may not exceed.
        size: Bytes of the weights, which other large numbers may not exceed.

    Raises:
        ValueError: A number is too large.
    """
    largest = max(MAX_SMALL_NUMBER, size)
    for key, number in _numbers(config):
        if re.search(r"layers|num_\w*blocks", key) and number > weights:
            raise ValueError(
                f"config.json has {key}={number}, but there are only {weights} weights; use matching files"
            )
        if number > largest:
            raise ValueError(f"config.json has {key}={number}, which is too large for its weights; use matching files")


def _check_widths(folder: Path, config: Any, cls: Any) -> None:
    """Check that a network can be built and has no more parameters than its files have bytes.

    diffusers would allocate the parameters before it misses the weights, and transformers would initialize them.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return
    try:
        with quiet_libraries(), torch.device("meta"):
            network = build_network(cls, config)
    except Exception as error:  # Files from others can make the libraries fail in every way.
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return  # This class cannot be built without memory.
        raise ValueError(f"config.json cannot be used: {error}") from error
    needed = sum(parameter.numel() for parameter in network.parameters())
    present = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if needed > present:
        raise ValueError(
            f"config.json describes {needed:,} parameters, but the files have {present:,} bytes; use matching files"
        )


def build_network(cls: Any, config: Any) -> nn.Module:
    """A network of a class of diffusers or transformers with the decoded content of its ``config.json``."""
    network: nn.Module
    if hasattr(cls, "from_config"):
        network = cls.from_config(config)
    else:
        # As when the weights are loaded, an implementation of attention that the file names is not used.
        network = cls(cls.config_class.from_dict(config, attn_implementation=None))
    return network


def _numbers(value: Any) -> Iterator[tuple[str, int]]:
    """All integers in a decoded JSON value with their keys."""
    return ((key, item) for key, item in _items(value) if isinstance(item, int) and not isinstance(item, bool))


def _items(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All scalars in a decoded JSON value with their keys; those of a list have the key of the list.

    Keys of nested values follow those of the outer ones after a dot.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _items(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _items(item, key)
    else:
        yield key, value


def _count_tensors(path: Path) -> int | None:
    """Number of tensors in the header of a safetensors file; None for a damaged one."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_JSON_BYTES:
            return None
        header = file.read(size)
    try:
        return sum(name != "__metadata__" for name in json.loads(header))
    except (ValueError, TypeError, RecursionError):
        return None


def _weight_files(index: Path) -> set[str]:
    content = read_json_file(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index.name} has no weight_map from weights to files")
    return set(names.values())
