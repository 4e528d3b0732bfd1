"""Short runs whose results are kept: every method on images and on a radiance field, every representation.

The configs are plain YAML, as a user writes them, and use the keys and names of the version that made the kept values.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from scoredist3d import cli

GOLDEN = Path(__file__).parents[1] / "golden"
VALUES = GOLDEN / "values.json"
CHECKPOINTS = GOLDEN / "checkpoints"
SOURCE = "3d/sds"  # edits of a scene start from this one
KEPT = 6  # values of each tensor beside its norm
# In the first steps the gradients of these are zero up to rounding, and AdamW makes whole steps of them.
ROUNDING_ONLY = ("phi.camera.2.",)

_PHI: dict[str, Any] = {"phi": {"channels": [4]}}
METHODS: dict[str, dict[str, Any]] = {
    "sds": {},
    "asd": _PHI,
    "bridge": {"stage_two_start_step": 2, "source_prompt": "green", "target_modifier": ""},
    "classifier-sd": {},
    "collaborative-csd": {},
    "consistent3d": {},
    "delta-denoising": {"source_prompt": "green"},
    "dsd": {"ode_steps": 4},
    "esd": _PHI,
    "fsd": {},
    "hifa": {"denoise_steps": 2},
    "ism": {"inversion_steps": 2},
    "lmc": {"corrective": "identity"},
    "nfsd": {"negative_prompt": "yellow"},
    "posterior-distillation": {"source_prompt": "green"},
    "rfds": {},
    "sdi": {"inversion_steps": 4},
    "sjc": {},
    "vsd": _PHI,
}
EDITING = ("delta-denoising", "posterior-distillation")
_GRID: dict[str, Any] = {"grid": {"num_levels": 2, "log2_hashmap_size": 6}, "network": {"hidden_width": 8}}
_VOLUME: dict[str, Any] = {"num_samples": 8, "occupancy": {"resolution": 8}}
_SURFACE: dict[str, Any] = {"renderer": {"type": "mesh-rasterizer"}}
_SDF: dict[str, Any] = {"type": "implicit-sdf", "shape_init_resolution": 8, **_GRID}
REPRESENTATIONS: dict[str, dict[str, Any]] = {
    "implicit-volume": {"geometry": {"type": "implicit-volume", **_GRID}, "renderer": _VOLUME},
    "implicit-sdf": {"geometry": _SDF, "renderer": {"type": "volume", **_VOLUME}, "loss": {"eikonal": 0.1}},
    "neus": {
        "geometry": _SDF,
        "renderer": {"type": "neus-volume", "estimator": "proposal", "num_samples": 8, "training_chunk": 20},
        "loss": {"eikonal": 0.1, "orientation": 0.1},
    },
    "gaussians": {
        "geometry": {"type": "gaussians", "num_points": 64},
        "renderer": {"type": "gaussian-splatting"},
    },
    # An odd size keeps vertices off the borders of the hash grid's cells, where rounding decides between neighbours.
    "dmtet": {"geometry": {"type": "dmtet", "resolution": 8, "shape_init_size": 0.437, **_GRID}, **_SURFACE},
    "flexicubes": {"geometry": {"type": "flexicubes", "resolution": 8, **_GRID}, **_SURFACE},
    "textured-mesh": {
        "geometry": {
            "type": "textured-mesh",
            "mesh": "scoredist3d/assets/sketches/mug.obj",
            "texture_size": 16,
            "max_faces": 100,
        },
        **_SURFACE,
    },
    "pbr": {
        "geometry": {"type": "implicit-volume", **_GRID},
        "renderer": _VOLUME,
        "material": {"type": "pbr"},
        "background": {"type": "environment"},
    },
}
# Cases whose runs are kept: one per representation, and one with a second network.
KEPT_RUNS = [*(f"representation/{name}" for name in REPRESENTATIONS), "3d/vsd"]
NAMES = [
    *(f"3d/{method}" for method in METHODS),
    *(f"2d/{method}" for method in METHODS),
    *(f"representation/{name}" for name in REPRESENTATIONS),
]


def config_of(name: str, folder: Path, source: Path | None = None) -> dict[str, Any]:
    """The config of a case as plain data; ``source`` is the run that edits of a scene start from."""
    kind, _, key = name.partition("/")
    method = "sds" if kind == "representation" else key
    # A visible eps: where a gradient is all rounding, Adam would otherwise take a whole step in a random direction.
    system: dict[str, Any] = {
        "guidance": {"type": method, **METHODS[method]},
        "optimizer": {"name": "adam", "lr": 0.01, "eps": 1e-2},
    }
    if kind == "2d":
        geometry: dict[str, Any] = {"type": "image-canvas", "parametrisation": "latents", "particles": 2}
        edits = {"init_prompt": "red", "init_steps": 2} if method in EDITING else {}
        system |= {"type": "text-to-2d", "geometry": geometry | edits}
    else:
        system |= {"type": "text-to-3d", **REPRESENTATIONS["implicit-volume" if kind == "3d" else key]}
    if kind == "3d" and method in EDITING:
        system["init_from"] = str(source)
    return {
        "name": name.replace("/", "-"),
        "prompt": "red left blob",
        "seed": 5,
        "output_root": str(folder),
        "prior": {"type": "gaussian-mixture", "image_size": 8},
        "system": system,
        "data": {"type": "random-camera", "batch_size": 2, "height": 8, "width": 8},
        "trainer": {"max_steps": 5},
        "preview": {"every_n_steps": 0},
        "checkpoint": {"every_n_steps": 0},
        "log": {"tensorboard": False},
        "test": {"frames": 1, "height": 16, "width": 16, "format": "gif"},
        "exporter": {"type": "textured-mesh", "resolution": 12, "texture_size": 32, "max_faces": 100, "check": False},
    }


def run_case(name: str, folder: Path, source: Path | None = None) -> Path:
    """Train a case with the command line; returns its run folder. A scene too empty for a mesh is fine here."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config_of(name, folder, source)), encoding="utf-8")
    code = cli.main(["--config", str(file), "--train", "--gpu", "cpu"])
    assert code in (cli.OK, cli.RUN_FAILED)
    (checkpoint,) = folder.rglob("last.ckpt")
    return checkpoint.parents[1]


def pipeline_config(folder: Path) -> dict[str, Any]:
    """A radiance field, then a mesh made from it: the smallest pipeline."""
    shared = {
        key: value for key, value in config_of(SOURCE, folder).items() if key not in ("name", "system", "trainer")
    }
    optimizer = {"name": "adam", "lr": 0.01, "eps": 1e-2}
    refined = {"type": "dmtet", "resolution": 12, **_GRID}
    stages = {
        "coarse": {"system": {"type": "text-to-3d", "optimizer": optimizer, **REPRESENTATIONS["implicit-volume"]}},
        "refine": {
            "system": {
                "type": "text-to-3d",
                "optimizer": optimizer,
                "geometry": refined,
                "conversion": {"resolution": 16},
                "init_from": "stage:coarse",
                **_SURFACE,
            }
        },
    }
    guidance = {"guidance": {"type": "sds"}}
    for stage in stages.values():
        stage["system"] |= guidance
        stage["trainer"] = {"max_steps": 3}
    return {"name": "pipeline", **shared, "stages": stages}


def run_pipeline(folder: Path) -> Path:
    """Train the pipeline; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(pipeline_config(folder)), encoding="utf-8")
    assert cli.main(["--config", str(file), "--train", "--gpu", "cpu"]) == cli.OK
    (found,) = folder.rglob("pipeline.yaml")
    return found.parent


def keep_run(run: Path, target: Path, made_in: Path) -> None:
    """Copy what resuming and exporting need: checkpoints, and configs and summaries without the path of ``made_in``."""
    for file in [*run.rglob("*.yaml"), *run.rglob("summary.json"), *run.rglob("last.ckpt")]:
        copy = target / file.relative_to(run)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".ckpt":
            shutil.copyfile(file, copy)
        else:
            text = file.read_text(encoding="utf-8").replace(str(made_in), "outputs")
            copy.write_text(text, encoding="utf-8")


def summary_of(run: Path) -> dict[str, dict[str, Any]]:
    """Norm and a few values of every floating-point tensor of a run's last checkpoint."""
    state = torch.load(run / "ckpts" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {
        key: {
            "norm": float(f"{value.double().norm().item():.6g}"),
            "values": [float(f"{item:.6g}") for item in spread(value)],
        }
        for key, value in sorted(tensors.items())
        if value.is_floating_point() and value.numel() and not any(part in key for part in ROUNDING_ONLY)
    }


def spread(value: torch.Tensor) -> list[float]:
    """A few values of a tensor, at equal distances."""
    flat = value.double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, min(KEPT, len(flat))).round().long()].tolist()


def kept_values() -> dict[str, dict[str, dict[str, Any]]]:
    """The values of all cases, as stored."""
    content: dict[str, dict[str, dict[str, Any]]] = json.loads(VALUES.read_text(encoding="utf-8"))
    return content
