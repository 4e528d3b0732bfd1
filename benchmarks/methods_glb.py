"""GLB files of the benchmark ``methods.py``: export, comparison with the true object, and means for the report."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from methods_means import cell, with_errors
from methods_references import caption_of
from PIL import Image
from quickstart_quality import NUM_VIEWS, TRUTH_SIZE, held_out, outlines
from quickstart_truth import ExportedGlb, compare_with_truth, exported_glb, pictures
from torch import Tensor

from scoredist3d.procedural.probe import Probe

if TYPE_CHECKING:
    from scoredist3d.config.experiment import ExperimentConfig

STRIP_SIZE = 128  # pixels of each view of the stored strip
STRIP_SUFFIX = "-glb.png"
DIFFERENCES = ("psnr", "ssim", "feature_distance", "normal_angle_deg", "off_depth", "see_through", "clipped_texels")
PROPERTIES = ("mean_dihedral_deg", "sharp_edges", "genus", "saturation")
"""Figures of the delivered mesh and of the true object, under the keys ``ours`` and ``true``."""
COLUMNS = (
    "PSNR",
    "normals (deg)",
    "depth off (%)",
    "dihedral (deg)",
    "edges over 45 deg (%)",
    "genus",
    "clipped texels (%)",
)


class Glb(NamedTuple):
    """GLB file of one 3D run.

    Attributes:
        figures: Figures by name; ``error`` is the reason for missing figures, or None.
        strip: (4, 128, 128, 3), every second held-out view over white; None if nothing was exported.
    """

    figures: dict[str, Any]
    strip: Tensor | None


def deliver(system: Any, config: ExperimentConfig, run: Path, device: torch.device) -> Glb:
    """Export the object of a trained system as a run does, and compare its GLB with the true object.

    The GLB and the report stay in ``export/`` in the run's folder. A failure is printed and its message becomes the
    figure ``error``. A prompt without a color has no true object, so its differences and properties are None.

    Args:
        system: The trained system; with several particles, the first one is measured.
        config: The config of the run.
        run: Folder of the run.
        device: Device of the system.
    """
    figures: dict[str, Any] = {"error": None, "seconds": {}, **dict.fromkeys((*DIFFERENCES, "ours", "true"))}
    strip = None
    try:
        began = time.perf_counter()
        glb = export(system, config, run)
        figures["seconds"]["export"] = time.perf_counter() - began
        figures |= {key: glb.report[key] for key in ("faces", "watertight", "components")} | {"bytes": glb.bytes}
        strip = strip_of(glb, device)
        if caption_of(config.prompt)[1] is not None:
            began = time.perf_counter()
            probe = Probe.load(device=device)
            views = held_out(TRUTH_SIZE, device)
            figures |= compare_with_truth(glb.delivered, config, outlines(device), views, probe).figures
            figures["seconds"]["comparison"] = time.perf_counter() - began
    # Any export may fail in any way, and the other figures of the run are still needed.
    except Exception as error:
        traceback.print_exc()
        figures["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Glb(figures, strip)


def export(system: Any, config: ExperimentConfig, run: Path) -> ExportedGlb:
    """GLB of a trained system, exported with the exporter of its config.

    Raises:
        ValueError: The object could not be exported, or the formats do not include glb.
    """
    from scoredist3d.training.folder import RunFolder
    from scoredist3d.training.outputs import export_objects

    folder = RunFolder(run)
    exported = export_objects(system, config, folder, lambda stage, fraction: None)
    if exported.problem is not None:
        raise ValueError(exported.problem)
    for path in (path for result in exported.results for path in result.paths):
        if path.suffix != ".glb":
            path.unlink()  # large together, and not measured
    return exported_glb(folder.export)


@torch.no_grad()
def strip_of(glb: ExportedGlb, device: torch.device) -> Tensor:
    """Small views (4, 128, 128, 3) of a GLB from every second held-out camera, over white.

    Raises:
        ValueError: The file has no colors.
    """
    cameras = held_out(STRIP_SIZE, device)[torch.arange(0, NUM_VIEWS, 2, device=device)]
    return pictures(glb.delivered, glb.delivered.views(cameras))


def read_strip(path: Path) -> Tensor | None:
    """Views (4, H, W, 3) in [0, 1] from the strip beside the results ``path`` of a run; None if there is none."""
    strip = strip_path(path)
    if not strip.is_file():
        return None
    with Image.open(strip) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return torch.stack(pixels.split(pixels.shape[0], dim=1)).float() / 255.0


def strip_path(path: Path) -> Path:
    """File of the strip of a run whose results are in ``path``, a .json file."""
    return path.with_name(path.stem + STRIP_SUFFIX)


def strips_of(folder: Path) -> dict[str, Tensor | None]:
    """Strip of the first run of each prompt of a method, in the order of the runs' images."""
    strips: dict[str, Tensor | None] = {}
    for path in sorted(folder.glob("*.json")):
        prompt = json.loads(path.read_text())["prompt"]
        if prompt not in strips:
            strips[prompt] = read_strip(path)
    return strips


def summary(folder: Path) -> dict[str, Any]:
    """Means over a method's runs with standard errors, number of exported files, and errors; empty for references."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results = [result for result in results if "glb" in result]
    if not results:
        return {}
    values: dict[str, list[float]] = {}
    for glb in (result["glb"] for result in results):
        for name in DIFFERENCES:
            values.setdefault(name, []).extend([] if glb[name] is None else [glb[name]])
        for side in ("ours", "true"):
            for name in PROPERTIES:
                values.setdefault(f"{side}_{name}", []).extend([] if glb[side] is None else [glb[side][name]])
    failed = [result for result in results if result["glb"]["error"] is not None]
    errors = [f"{result['prompt']!r}, seed {result['seed']}: {result['glb']['error']}" for result in failed]
    return {"glb": {"runs": len(results), "errors": errors, **with_errors(values)}}


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of a method in the order of ``COLUMNS``; "a / b" is the delivered mesh and the true object."""
    means = row.get("glb", {})

    def pair(name: str, digits: int, scale: float = 1.0) -> str:
        both = [cell(means, f"{side}_{name}", digits, scale=scale) for side in ("ours", "true")]
        return " / ".join(filter(None, both))

    found = [
        cell(means, "psnr", 1),
        cell(means, "normal_angle_deg", 1),
        cell(means, "off_depth", 1, scale=100.0),
        pair("mean_dihedral_deg", 1),
        pair("sharp_edges", 1, 100.0),
        pair("genus", 1),
        cell(means, "clipped_texels", 1, scale=100.0),
    ]
    return [text or "-" for text in found]


def notes() -> list[str]:
    """Explanation of the columns."""
    return [
        "- PSNR to clipped texels: the GLB that a run exports, beside the true object (the nearest member of the",
        "  category's family, as in quickstart_quality.py), from the same 8 cameras at 256 pixels over white.",
        "  Two numbers in a cell are the GLB and the true object.",
        "- normals: angle between the normals at nearest surface points. depth off: share of the common pixels whose",
        "  depths differ by more than 0.08 radii. dihedral: length-weighted mean angle between adjacent faces.",
        "- edges over 45 deg: share of the edge length. genus: number of handles.",
        "- clipped texels: share of the texels on the mesh that have a channel at 0 or 255.",
    ]


def failures(table: dict[str, dict[str, Any]]) -> list[str]:
    """Lines about the runs without figures of the GLB; empty if there are none."""
    failed = [f"- {name}, {error}" for name, row in table.items() for error in row.get("glb", {}).get("errors", [])]
    return ["", "Runs without figures of the GLB, which are not in its means:", "", *failed] if failed else []
