"""Fuzzers of what is added to a model, LoRA and textual inversions, and of models in one file.

A file is changed as those of model folders are; the model is the small one of :mod:`faults.fuzz_priors`.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from faults import fuzz_priors
from faults.fuzz_priors import Files
from faults.fuzzing import FuzzInput, FuzzTarget, mutated

WIDTH = 16
"""Width of the text encoder of the small model."""


@cache
def model_folder() -> tempfile.TemporaryDirectory[str]:
    """The folder of the small model, and ``config``, the same without weights; removed when the program ends."""
    place: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory()
    for name, content in fuzz_priors.pipelines()["latent"].items():
        for folder in ("model",) if name.endswith(".safetensors") else ("model", "config"):
            path = Path(place.name) / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return place


@cache
def valid_files() -> dict[str, bytes]:
    """Valid LoRA in two formats, textual inversions, and a single file."""
    import torch
    from safetensors.torch import save_file
    from shared.lora_files import factors, in_attention, write_diffusers, write_kohya
    from shared.original_layouts import clip, ldm_unet, ldm_vae, weights

    model = Path(model_folder().name) / "model"
    prior: Any = fuzz_priors.load(model)
    layers = factors(prior.denoiser.network, in_attention)
    few = dict(list(layers.items())[:4])
    header = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_q": 1}, "unet.use_rslora": False}
    tensors = ldm_unet(weights(model, "unet")) | ldm_vae(weights(model, "vae"), 2)
    tensors |= clip(weights(model, "text_encoder"), "cond_stage_model.transformer.")
    vectors = torch.ones(2, WIDTH)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_diffusers(root / "lora.safetensors", {"unet": few}, header)
        write_kohya(root / "lora kohya.safetensors", {"lora_unet": few}, [1.0])
        save_file({"<x>": vectors}, root / "inversion.safetensors")
        save_file({"clip_l": vectors, "clip_g": vectors.clone()}, root / "inversion both.safetensors")
        torch.save({"string_to_param": {"*": vectors}, "name": "sks"}, root / "inversion old.pt")
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, root / "single.safetensors")
        return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


HEADERS = (1, 0, -3, 1e308, float("nan"), None, "x", [], {}, {"(": 1}, {"to_q": "x"}, {".*": 0.5}, True, [2])
"""Values in the header of a LoRA."""


def _change_tensors(rng: random.Random, files: Files) -> None:
    """Rename, remove, exchange, reshape or convert tensors, or change the header; the file stays well-formed."""
    import torch
    from safetensors.torch import load, save

    (name,) = files
    tensors = dict(sorted(load(files[name]).items()))
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        key, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
        tensor, action = tensors[key], rng.randrange(8)
        if action == 0:
            tensors[rng.choice((key + "x", key[1:], key.replace("0", "1"), "x", "a.lora_A.weight"))] = tensors.pop(key)
        elif action == 1 and len(tensors) > 1:
            del tensors[key]
        elif action == 2:
            tensors[key], tensors[other] = tensors[other], tensor
        elif action == 3:
            tensors[key] = rng.choice(
                (tensor.flatten(), tensor[None], tensor.flatten()[:0], tensor.T if tensor.ndim == 2 else tensor)
            )
        elif action == 4:
            tensors[key] = tensor.to(
                rng.choice((torch.float16, torch.float64, torch.int64, torch.bool, torch.bfloat16))
            )
        elif action == 5:
            tensors[key] = torch.full_like(tensor, rng.choice((0, 1, float("inf"), float("nan"), -1e30)))
        elif action == 6:
            tensors[key.rpartition(".")[0] + rng.choice((".alpha", ".dora_scale", ".diff", ".bias"))] = torch.tensor(
                0.5
            )
        else:
            tensors[key] = torch.cat([tensor, tensor]) if tensor.ndim else tensor
    header = {f"unet.{each}": rng.choice(HEADERS) for each in ("lora_alpha", "alpha_pattern", "use_rslora", "r")}
    given = rng.choice((None, {"lora_adapter_metadata": json.dumps(rng.choice((header, *HEADERS)))}))
    files[name] = save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, given)


def make(rng: random.Random) -> FuzzInput:
    """One file after one or two changes."""
    name = rng.choice(list(valid_files()))
    files: Files = {name: valid_files()[name]}
    if name.endswith(".safetensors") and rng.random() < 0.7:
        _change_tensors(rng, files)
        return FuzzInput(files)
    for _ in range(rng.choice((1, 1, 2))):
        if name.endswith(".safetensors") and rng.random() < 0.8:
            fuzz_priors.change_header(rng, files)
        else:
            files[name] = mutated(rng, files[name])
    return FuzzInput(files)


def load_and_predict(folder: Path) -> None:
    """Load the small model with the file in ``folder``, or the file itself, and use its parts."""
    (file,) = folder.iterdir()
    model = Path(model_folder().name)
    kind = file.name.partition(".")[0].partition(" ")[0]
    options: dict[str, Any] = {
        "lora": {"lora": str(file)},
        "inversion": {"textual_inversion": str(file), "allow_pickle": True},
        "single": {"config": str(model / "config")},
    }[kind]
    fuzz_priors.use(fuzz_priors.load(file if kind == "single" else model / "model", **options))


def check(given: FuzzInput, folder: Path) -> str | None:
    """Load a file in a folder of its own; returns what is wrong with the outcome."""
    shutil.rmtree(folder, ignore_errors=True)
    return fuzz_priors.outcome(given, folder, load_and_predict)


TARGET = FuzzTarget(make, check)
