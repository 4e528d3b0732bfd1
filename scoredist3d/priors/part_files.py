"""Checks of the files of a local model folder before diffusers or transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scoredist3d.limits import MAX_JSON_BYTES, check_file_size
from scoredist3d.tensor_files import LOADING_ERRORS, check_tensor_file

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_part(folder: Path, *, allow_pickle: bool = False, option: str = "") -> None:
    """Check the files in the folder of one part of a pipeline.

    Args:
        folder: The folder of the part, e.g. ``unet``.
        allow_pickle: Whether pickled weights may be read.
        option: The configuration key that allows them, for the error message.

    Raises:
        ValueError: A JSON file is too large, the index of the weights names other files than weights in this folder,
            the part is an adapter for another model, or pickled weights are damaged or not allowed.
    """
    for path in sorted(folder.glob("*.json")):
        check_file_size(path, MAX_JSON_BYTES, "a JSON file of a model")
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


def _weight_files(index: Path) -> set[str]:
    content = read_json_file(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index.name} has no weight_map from weights to files")
    return set(names.values())
