"""Fuzzers of what is added to a model, LoRA and textual inversions, and of models in one file.

A file is changed as those of model folders are; the model is the small one of :mod:`faults.fuzz_priors`.
"""

from __future__ import annotations

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


def make(rng: random.Random) -> FuzzInput:
    """One file after one or two changes, mostly of the header."""
    name = rng.choice(list(valid_files()))
    files: Files = {name: valid_files()[name]}
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
