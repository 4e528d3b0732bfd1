"""Fuzzer of model folders: small pipelines in diffusers layout after changes of their files.

A change replaces values in a JSON file or in the header of safetensors, changes bytes, or removes, empties or exchanges
files. The folder then either loads and predicts, or it raises one short :class:`PriorError` or ``FieldError``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from faults.fuzz_files import LONGEST_MESSAGE
from faults.fuzzing import FuzzInput, FuzzTarget, mutated

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 16, 1000, 2**31, 2**63, -(2**31), 10**30),
    *(0.0, 0.5, -0.5, 1e-300, 1e308, float("inf"), float("nan"), "", "x", "1", "epsilon", "float16", "../x"),
    *([], {}, [0], [1, 2], [[]], ["x"], {"a": 1}, [None, None], ["diffusers", "AutoencoderKL"], "linear", "F8", "F64"),
)
Files = dict[str, bytes]


@cache
def pipelines() -> dict[str, Files]:
    """Files of small valid pipelines, by relative path: latent, in pixel space with cameras, and in several files."""
    from shared.stable_diffusion_folder import build_folder

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        latent = _read(build_folder(root / "latent", camera=False, vae="kl"))
        pixels = _read(build_folder(root / "pixels", camera=True, vae=None))
    pixels["camera.json"] = b'{"reference_extent": 1.1}'
    pixels["vocabulary.json"] = b'{"words": ["a", "red"], "nouns": {"mug": ["cup"]}, "generic_nouns": ["thing"]}'
    return {"latent": latent, "pixels": pixels, "split": _split(latent)}


def _read(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _split(files: Files) -> Files:
    """The same pipeline with the weights of the UNet in two files and an index."""
    from safetensors.torch import load, save

    single = "unet/diffusion_pytorch_model.safetensors"
    weights = load(files[single])
    names, shards, table = sorted(weights), {}, {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        shards[f"unet/{name}"] = save({key: weights[key] for key in part}, {"format": "pt"})
        table |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": table}).encode()
    kept = {name: content for name, content in files.items() if name != single}
    return {**kept, **shards, "unet/diffusion_pytorch_model.safetensors.index.json": index}


def make(rng: random.Random) -> FuzzInput:
    """A pipeline after one or two changes."""
    files = dict(rng.choice(list(pipelines().values())))
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice((_json, _json, _json, change_header, change_header, _bytes, _remove, _exchange))(rng, files)
    return FuzzInput(files)


def _some(rng: random.Random, files: Files, suffix: str = "") -> str:
    """A file; configuration files come before the large vocabularies of tokenizers."""
    names = [name for name in sorted(files) if name.endswith(suffix)] or sorted(files)
    small = [name for name in names if "config" in name or "index" in name or "/" not in name]
    return rng.choice(small if small and rng.random() < 0.8 else names)


def _json(rng: random.Random, files: Files) -> None:
    """Replace, remove, add or exchange values of a JSON file."""
    name = _some(rng, files, ".json")
    try:
        content = json.loads(files[name])
    except ValueError:
        return
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = _changed(rng, content)
    files[name] = json.dumps(content).encode()


def _changed(rng: random.Random, value: Any) -> Any:
    """A decoded JSON value with one change at a random depth."""
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = list(range(len(value)))
    if not keys or rng.random() < 0.02:
        return rng.choice(VALUES)
    copied, key = value.copy(), rng.choice(keys)
    action = rng.random()
    if action < 0.15:
        del copied[key]
    elif action < 0.25:
        other = rng.choice(keys)
        copied[key], copied[other] = copied[other], copied[key]
    elif action < 0.3 and isinstance(copied, dict):
        copied[rng.choice(("auto_map", "_class_name", "quantization_config", "x", ""))] = rng.choice(VALUES)
    elif action < 0.4 and isinstance(copied[key], int):
        copied[key] = copied[key] * rng.choice((-1, 2, 3, 1000))
    else:
        copied[key] = _changed(rng, copied[key])
    return copied


def change_header(rng: random.Random, files: Files) -> None:
    """Change the header of a safetensors file: types, shapes, places and names of tensors."""
    name = _some(rng, files, ".safetensors")
    data = files[name]
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return
    for _ in range(rng.choice((1, 1, 2))):
        header = _changed(rng, header)
    text = json.dumps(header).encode()
    files[name] = len(text).to_bytes(8, "little") + text + data[8 + size :]


def _bytes(rng: random.Random, files: Files) -> None:
    name = _some(rng, files)
    files[name] = mutated(rng, files[name])


def _remove(rng: random.Random, files: Files) -> None:
    """Remove or empty a file, or remove a folder."""
    name = _some(rng, files)
    if rng.random() < 0.3:
        files[name] = b""
    elif rng.random() < 0.3 and "/" in name:
        folder = name.partition("/")[0] + "/"
        for other in [other for other in files if other.startswith(folder)]:
            del files[other]
    elif len(files) > 1:
        del files[name]


def _exchange(rng: random.Random, files: Files) -> None:
    """Exchange two files, or put one of another pipeline in its place."""
    name = _some(rng, files)
    if rng.random() < 0.5:
        other = _some(rng, files, Path(name).suffix)
        files[name], files[other] = files[other], files[name]
    else:
        foreign = rng.choice(list(pipelines().values()))
        files[name] = foreign.get(name, foreign[_some(rng, foreign, Path(name).suffix)])


def load(folder: Path, **options: Any) -> Any:
    """The prior of a folder or file."""
    from scoredist3d.priors.diffusers_prior import DiffusersPrior

    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(folder), **options))


def use(prior: Any) -> None:
    """Use all parts of a prior, as a run does."""
    import torch

    conditioning = prior.embed(["a red mug"])
    side = prior.image_size
    if side > 64:  # A larger size is a valid choice, but it takes time.
        return
    z = prior.encode(torch.zeros(1, side, side, 3))
    prior.predict(z, torch.full((1,), 0.5), conditioning)
    prior.decode(z)


def load_and_predict(folder: Path) -> None:
    """Load a pipeline and use all of its parts, as a run does."""
    use(load(folder))


def check(given: FuzzInput, folder: Path) -> str | None:
    """Load a folder in which nothing else is; returns what is wrong with the outcome."""
    return outcome(given, folder, load_and_predict)


def outcome(given: FuzzInput, folder: Path, action: Callable[[Path], None]) -> str | None:
    """What is wrong with the outcome of an action on the files of an input, which are removed afterwards."""
    from scoredist3d.config.errors import FieldError
    from scoredist3d.priors.diffusers_loading import PriorError

    given.write(folder)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            action(folder)
    except (PriorError, FieldError) as error:
        text = str(error)
        if "Traceback" in text or " object at 0x" in text:
            return f"internal text: {text[:300]}"
        return None if 0 < len(text) <= LONGEST_MESSAGE else f"a message of {len(text)} characters"
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder)
    return None


TARGET = FuzzTarget(make, check)
