"""The smallest whole runs: exact prior, tiny sizes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.validation import validate
from scoredist3d.training.console import Console


def plain(folder: Path, system: str = "text-to-3d", **changes: Any) -> dict[str, Any]:
    """A config as a dict; ``changes`` replace or extend top-level blocks."""
    block: dict[str, Any] = {"type": system, "guidance": {"guidance_scale": 7.5}}
    if system == "text-to-3d":
        block |= {
            "geometry": {
                "grid": {"num_levels": 3, "log2_hashmap_size": 6, "coarse_to_fine": {"start_level": 1, "every": 2}}
            },
            "renderer": {"num_samples": 12, "occupancy": {"resolution": 8, "every": 2}},
            "background": {"type": "environment"},
            "loss": {"sparsity": {"from": 0.1, "to": 1.0, "end": 10}},
        }
    config: dict[str, Any] = {
        "prompt": "red left blob",
        "output_root": str(folder),
        "prior": {"type": "gaussian-mixture", "image_size": 8},
        "system": block,
        "data": {"type": "random-camera", "batch_size": 2, "height": 8, "width": 8},
        "trainer": {"max_steps": 3},
        "preview": {"every_n_steps": 2, "size": 8, "azimuths": [0.0, 90.0]},
        "checkpoint": {"every_n_steps": 0},
        "log": {"every_n_steps": 2, "tensorboard": False},
        "test": {"frames": 3, "height": 16, "width": 16},
        "exporter": {"type": "textured-mesh", "resolution": 16, "texture_size": 32, "max_faces": 100, "check": False},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    return config


def make(folder: Path, system: str = "text-to-3d", **changes: Any) -> ExperimentConfig:
    """The validated config."""
    return validate(plain(folder, system, **changes))


class Recorder(Console):
    """A console that keeps what it printed."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())

    @property
    def text(self) -> str:
        return self.stream.getvalue()  # type: ignore[attr-defined]
