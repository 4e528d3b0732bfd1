"""Files of models: folders, files of the hub, and errors about them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from scoredist3d.config.errors import brief
from scoredist3d.paths import is_file
from scoredist3d.priors.hub import INDEX, hub_problem
from scoredist3d.priors.part_files import read_json_file
from scoredist3d.priors.quiet import quiet_libraries
from scoredist3d.priors.vocabulary import Vocabulary

EMBEDDED = "embedded"
_ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED_FOLDER = _ASSETS / "prior"
PACKAGED = {
    EMBEDDED: (EMBEDDED_FOLDER, "scripts/train_prior.py"),
    "embedded-flow": (_ASSETS / "prior-flow", "scripts/train_flow_prior.py"),
}
"""Models that come with the package: their folders and the scripts that train them."""
_SAFE = (".safetensors",)
MISFITS = (RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)
"""Errors of a network that does not fit its inputs, e.g. the tokens of another tokenizer."""
MODEL_KEY = "prior.pretrained_model_name_or_path"
PICKLE_KEY = "prior.allow_pickle"


class PriorError(ValueError):
    """Failure to load a model; the message names the configuration key, the folder and the part."""


def local_folder(name: str) -> Path | None:
    """The existing folder of a packaged model or path ``name``; None for anything else, e.g. a hub id."""
    path = PACKAGED[name][0] if name in PACKAGED else Path(os.path.expanduser(name))
    return path if is_file(path, folder=True) else None


def find_model(name: str, key: str) -> Path | None:
    """The folder of a packaged model or path ``name``; None for a hub id.

    Raises:
        PriorError: ``name`` is neither an existing folder nor a hub id ``owner/model``.
    """
    path = local_folder(name)
    if path is not None:
        return path
    if name in PACKAGED:
        raise PriorError(
            f"{key}: the prior {name!r} is missing from {PACKAGED[name][0]}; reinstall scoredist3d, train it with "
            f"{PACKAGED[name][1]}, or name another diffusers folder"
        )
    if not is_hub_id(name):
        raise PriorError(f"{key}: {name!r} is neither an existing folder nor a hub id of the form owner/model")
    return None


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a hub id, ``owner/model``."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def read_vocabulary(folder: Path, key: str = MODEL_KEY) -> Vocabulary | None:
    """The content of the folder's ``vocabulary.json``; None if there is no such file.

    Raises:
        PriorError: The file does not have the form that :meth:`Vocabulary.parse` describes.
    """
    path = folder / "vocabulary.json"
    if not path.is_file():
        return None
    try:
        return Vocabulary.parse(read_json(path, key))
    except PriorError:
        raise
    except ValueError as error:
        raise PriorError(f"{key}: {path} {error}") from error


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """The content of the folder's ``model_index.json``.

    Raises:
        PriorError: The file is missing or not a JSON object.
    """
    path = folder / INDEX
    if not path.is_file():
        raise PriorError(
            f"{key}: {folder} is not a diffusers pipeline: {INDEX} is missing; use the folder of a complete pipeline"
        )
    index = read_json(path, key)
    if not isinstance(index, dict):
        raise PriorError(f"{key}: {path} must be a JSON object")
    return index


def read_json(path: Path, key: str) -> Any:
    """The content of a JSON file of a model folder.

    Raises:
        PriorError: The file is too large or not JSON.
    """
    try:
        return read_json_file(path)
    except ValueError as error:
        raise PriorError(f"{key}: {error}") from error


def weight_file(name: str, file: str | None, default: str, key: str, suffixes: tuple[str, ...] = _SAFE) -> Path:
    """A file of weights: ``name`` itself, or a file in the folder or the hub repository ``name``.

    Args:
        name: A file, a folder, or a hub id.
        file: Name of the file in the folder or repository, if it is given.
        default: Name of the file that is used otherwise; another one is used if it is the only one in the folder.
        key: Configuration key that holds ``name``, for error messages.
        suffixes: Suffixes of the file.

    Raises:
        PriorError: There is no such file, or the name does not determine one.
    """
    path = Path(os.path.expanduser(name))
    if is_file(path, folder=True):
        found = sorted(each.name for each in path.iterdir() if each.suffix in suffixes)
        chosen = file or (default if default in found or len(found) != 1 else found[0])
        if not is_file(path / chosen):
            raise PriorError(
                f"{key}: {path} has no file {chosen}, but {', '.join(found[:5]) or 'no weights'}; name one"
            )
        path = path / chosen
    elif not is_file(path):
        if not is_hub_id(name) or name.endswith(suffixes):
            raise PriorError(
                f"{key}: {name!r} is neither an existing file or folder nor a hub id of the form owner/model"
            )
        path = download_file(name, file or default, None, key)
    if path.suffix not in suffixes:
        raise PriorError(f"{key}: {path} is not a {' or '.join(suffixes)} file; convert it to safetensors")
    return path


@contextmanager
def opened_weights(path: Path, key: str) -> Iterator[Any]:
    """Context manager that opens a safetensors file; tensors are read when they are requested.

    Raises:
        PriorError: The file is damaged or of another format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise PriorError(
            f"{key}: {path} is not a complete safetensors file: {first_line(error)}; download it again"
        ) from error


def read_weights(path: Path, key: str, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file whose names begin with ``prefix``, and the texts in its header.

    Raises:
        PriorError: The file is damaged or of another format.
    """
    with opened_weights(path, key) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def download_file(name: str, file: str, revision: str | None, key: str) -> Path:
    """A file of a hub repository, from the local cache if it is there.

    Raises:
        PriorError: The repository or the file cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        with quiet_libraries():
            return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError) as error:
        problem = hub_problem(error, name, file) or f"cannot be downloaded from the hub: {first_line(error)}"
        raise PriorError(f"{key}: {name!r} is not an existing folder, and the model of this id {problem}") from error


def first_line(error: BaseException, *, all_lines: bool = False) -> str:
    """The first line of an error's message, or all lines as one, shortened; with its type if it is not a sentence."""
    text = brief(" ".join(str(error).split()) if all_lines else str(error).strip().split("\n")[0], 200)
    return text if " " in text else f"{type(error).__name__} {text}".strip()
