"""Report of the benchmark ``methods.py``: tables, plots and image sheets from the results of ``methods_runs.py``."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods_glb
import numpy as np
import torch
from methods_means import cell, ratio_terms, shown, with_errors
from methods_plots import bars, scatter
from methods_references import REAL_2D, REAL_3D, REFERENCES, caption_of
from methods_runs import DIMENSIONS, folder_of
from PIL import Image, ImageDraw
from torch import Tensor

from scoredist3d.evaluation.measures import (
    expected_entropy,
    high_frequency_share,
    kernel_distance,
    label_entropy,
    pair_distance,
    saturation,
)
from scoredist3d.export.images import image_grid, save_png
from scoredist3d.guidance.core.image_space import resized
from scoredist3d.procedural import CATEGORIES, COLORS
from scoredist3d.procedural.probe import Probe

NUM_REAL = {"2d": REAL_2D, "3d": REAL_3D}
OPEN = ("color", "second_color", "pattern")  # labels of the probe that a caption may leave open
DOCS_PROMPTS = {"2d": 8, "3d": 3}  # prompts of the small images for the docs; in 3D with four views each


@dataclass(frozen=True)
class Seen:
    """Images of one prompt and the probe's outputs for them; A assets with V views each.

    Attributes:
        images: (A, V, H, W, 3).
        features: (A, V, F).
        category, color: (A, V), the index recognized in each image.
        labels: Attribute -> (A,), recognized from the mean over the views of each asset.
    """

    images: Tensor
    features: Tensor
    category: Tensor
    color: Tensor
    labels: dict[str, Tensor]


@torch.no_grad()
def read(probe: Any, images: Tensor) -> Seen:
    """Apply the probe to images (A, V, H, W, 3) in [0, 1]."""
    assets, views = images.shape[:2]
    readings = [probe(part) for part in images.flatten(0, 1).split(128)]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(reading, name) for reading in readings]).unflatten(0, (assets, views))

    labels = {name: joined(name).mean(1).argmax(-1) for name in OPEN}
    return Seen(images, joined("features"), joined("category").argmax(-1), joined("color").argmax(-1), labels)


def spread(features: Tensor) -> float:
    """Mean feature distance between two or more assets in the same view; ``features`` is (A, V, F)."""
    return statistics.fmean(pair_distance(features[:, view]) for view in range(features.shape[1]))


def measure(prompt: str, made: Seen, real: Seen, unit: float) -> dict[str, list[float]]:
    """Measures of one prompt; ``real_x`` is the value of ``x`` for real renders, for measures shown as ratios.

    Category, color, saturation and detail have one value per asset, the other measures one value per prompt.

    Args:
        prompt: Prompt that gives the correct category and color.
        made: Images of the method.
        real: Real renders of the caption from the same cameras.
        unit: Root mean square of the features, by which they are divided for the distance.
    """
    category, color = caption_of(prompt)
    count = len(made.images)
    features, real_features = made.features.flatten(0, 1) / unit, real.features.flatten(0, 1) / unit
    figures = {
        "category": (made.category == CATEGORIES.index(category)).float().mean(1).tolist(),
        "distance": [kernel_distance(features, real_features)],
    }
    for name, measured in (("saturation", saturation), ("detail", high_frequency_share)):
        figures[name] = measured(made.images.flatten(0, 1)).unflatten(0, (count, -1)).mean(1).tolist()
        figures[f"real_{name}"] = [float(measured(real.images.flatten(0, 1)).mean())] * count
    if color is not None:
        figures["color"] = (made.color == COLORS.index(color)).float().mean(1).tolist()
    if count > 1:
        left_open = [name for name in OPEN if name != "color" or color is None]
        figures["spread"], figures["real_spread"] = [spread(made.features)], [spread(real.features)]
        figures["labels"] = [sum(label_entropy(made.labels[name]) for name in left_open)]
        figures["real_labels"] = [sum(expected_entropy(real.labels[name], count) for name in left_open)]
    return figures


def collect(out: Path, dimension: str) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Measures by method, and images by method and prompt; the references come first.

    Raises:
        ValueError: There are no real renders to compare with.
    """
    probe, limit = Probe.load(), NUM_REAL[dimension]
    folders = {path.name: path for path in sorted((out / dimension).iterdir()) if any(path.glob("*.json"))}
    references = [folder_of(out, dimension, name).name for name in REFERENCES]
    real_name = references[0]
    if real_name not in folders:
        raise ValueError(f"{out / dimension} contains no real renders; see its logs for the failed run")
    order = [name for name in references if name in folders] + [name for name in folders if name not in references]
    real = {prompt: read(probe, parts[0][:limit]) for prompt, parts in parts_of(folders[real_name]).items()}
    unit = float(torch.cat([seen.features.flatten(0, 1) for seen in real.values()]).square().mean().sqrt())
    table: dict[str, dict[str, Any]] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    for name in order:
        cut = limit if name == real_name else 0
        parts = {prompt: made for prompt, made in parts_of(folders[name]).items() if prompt in real}
        pictures[name] = {prompt: torch.cat([part[cut:] for part in made]) for prompt, made in parts.items()}
        rows = [measure(prompt, read(probe, made), real[prompt], unit) for prompt, made in pictures[name].items()]
        table[name] = {**means(rows), **costs(folders[name]), **methods_glb.summary(folders[name])}
    return table, pictures


def parts_of(folder: Path) -> dict[str, list[Tensor]]:
    """Images (A, V, H, W, 3) in [0, 1] of each task, by prompt."""
    parts: dict[str, list[Tensor]] = {}
    for path in sorted(folder.glob("*.json")):
        images = torch.load(path.with_suffix(".pt"), weights_only=True).float() / 255.0
        parts.setdefault(json.loads(path.read_text())["prompt"], []).append(images)
    return parts


def means(rows: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Means over the values of all prompts, and their ratios to real renders, with standard errors."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, numbers in row.items():
            values.setdefault(name, []).extend(numbers)
    for name in ("saturation", "detail", "spread", "labels"):
        if any(values.get(f"real_{name}", [])):
            values[f"{name}_ratio"] = ratio_terms(values[name], values[f"real_{name}"])
    return {"prompts": len(rows), **with_errors(values)}


def costs(folder: Path) -> dict[str, Any]:
    """Mean time, memory and NFE over a method's runs with standard errors; empty for references."""
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    keys = ("seconds", "steps", "memory_mib", "prior_nfe", "declared_nfe", "own_nfe")
    return with_errors({key: [run[key] for run in runs] for key in keys if all(key in run for run in runs)})


def write(out: Path, command: str, dimensions: tuple[str, ...], docs: Path | None) -> bool:
    """Write the report to ``out`` and small images to ``docs``; returns whether there was anything to report."""
    timing_file = out / "timing.json"
    timing = json.loads(timing_file.read_text()) if timing_file.is_file() else {}
    results = [json.loads(path.read_text()) for d in dimensions for path in out.glob(f"{d}/*/*.json")]
    # References are not training runs; the device that rendered them is not reported.
    made_on = {result["device"] for result in [*results, *timing.values()] if "device" in result and "steps" in result}
    device = "; ".join(sorted(made_on))
    lines = ["Produced by", "", "```sh", command, "```", "", f"on {device}.", ""]
    tables: dict[str, Any] = {}
    for dimension in (d for d in DIMENSIONS if d in dimensions and (out / d).is_dir()):
        table, pictures = collect(out, dimension)
        tables[dimension] = table
        if dimension == "2d":
            for name in table:
                table[name] |= {
                    f"alone_{key}": value
                    for key, value in timing.get(name, {}).items()
                    if key not in ("recipe", "device")
                }
        lines += [*markdown(dimension, table), ""]
        plots = {
            f"quality-{dimension}.svg": scatter(
                [(n, r["spread_ratio"], r["distance"]) for n, r in table.items() if "spread_ratio" in r],
                "spread between seeds, relative to real renders",
                "distance to real renders (KID style)",
            ),
            f"cost-{dimension}.svg": bars(
                [(n, r["prior_nfe"], r["own_nfe"]) for n, r in table.items() if "prior_nfe" in r],
                "network evaluations per image and step: prior, and the method's own",
            ),
        }
        for folder in [out, *([docs] if docs is not None else [])]:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in plots.items():
                (folder / name).write_text(text, encoding="utf-8")
        write_sheets(out, docs, dimension, pictures)
    if not tables:
        return False
    (out / "methods.md").write_text("\n".join(lines), encoding="utf-8")
    (out / "methods.json").write_text(json.dumps({"command": command, "device": device, **tables}, indent=2) + "\n")
    print("\n".join(lines))
    return True


def markdown(dimension: str, table: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown table of one dimension, with an explanation of its columns and the runs without a GLB."""
    flat = dimension == "2d"
    head = ["", "category", "color", "spread", *(["open labels"] if flat else []), "saturation", "detail", "distance"]
    head += [] if flat else methods_glb.COLUMNS
    head += ["NFE", "own", "steps", *(["ms per step"] if flat else []), "s per run", "MiB"]
    lines = [f"## {dimension.upper()}", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    quality = ["category", "color", "spread_ratio", *(["labels_ratio"] if flat else [])]
    for name, row in table.items():
        alone = row.get("alone_ms_per_step")
        if alone is not None:
            timed = {"seconds": alone * row["alone_steps"] / 1000, "memory_mib": row["alone_memory_mib"]}
        else:
            timed = row
        cells = [name, *(cell(row, key, error=not flat) for key in [*quality, "saturation_ratio", "detail_ratio"])]
        cells += [cell(row, "distance", 3), *([] if flat else methods_glb.cells(row))]
        cells += [shown(row.get("prior_nfe"), 1), shown(row.get("own_nfe"), 1), shown(row.get("steps"), 0)]
        cells += [shown(alone, 1)] if flat else []
        cells += [cell(timed, "seconds", 1, error=not flat), cell(timed, "memory_mib", 0, error=not flat)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *notes(flat), *([] if flat else methods_glb.failures(table))]


def notes(flat: bool) -> list[str]:
    """Explanation of the columns."""
    asset, timed = ("image", "one process alone, all seeds of a prompt") if flat else ("view", "while other jobs ran")
    labels = (
        "- open labels: entropy of color, second color and pattern in the probe's output, where the prompt is silent."
    )
    errors = "- ±: standard error of the mean, over all runs (prompts and seeds); of spread and distance, over prompts."
    return [
        f"- category, color: fraction of {asset}s in which the probe recognizes those of the prompt.",
        "- spread: mean distance between the probe's features of two seeds.",
        *([labels] if flat else []),
        "- saturation: mean HSV S. detail: fraction of the spectral power above half of the Nyquist frequency.",
        "- These are relative to real renders of the caption from the same cameras (entropy: of as many as seeds).",
        "- distance: unbiased squared MMD (cubic kernel, as in KID) of the probe's features to those real renders;",
        "  features in units of their root mean square; mean and standard error over prompts.",
        *([] if flat else methods_glb.notes()),
        "- NFE: evaluations of the prior per image and step, counted. own: evaluations of networks that the method",
        "  owns, as it declares them.",
        f"- s per run, MiB: {timed}.",
        *([] if flat else [errors]),
    ]


def write_sheets(out: Path, docs: Path | None, dimension: str, pictures: dict[str, dict[str, Tensor]]) -> None:
    """Write a sheet with one row per method (first seed of every prompt; in 3D four views), and images for the docs.

    In 3D the same views of the exported GLB are below those of the field; a GLB that is missing is left white. An image
    for the docs has two seeds of some prompts and, in 3D, the GLBs of the first one.
    """
    rows = {}
    for name, by_prompt in pictures.items():
        firsts = [views_of(images[0], dimension) for images in by_prompt.values()]
        if not firsts:
            continue
        rows[name] = torch.cat(firsts)
        strips = methods_glb.strips_of(out / dimension / name)
        found = [strips.get(prompt) for prompt in by_prompt]
        if any(strip is not None for strip in found):
            blank = torch.ones_like(firsts[0])
            rows[f"{name}, GLB"] = torch.cat([blank if strip is None else strip for strip in found])
        if docs is None:
            continue
        chosen = dict(list(by_prompt.items())[: DOCS_PROMPTS[dimension]])
        shown_seeds = range(min(2, min(len(images) for images in chosen.values())))
        lines = [torch.cat([views_of(images[seed], dimension) for images in chosen.values()]) for seed in shown_seeds]
        delivered = [strip for prompt in chosen if (strip := strips.get(prompt)) is not None]
        if len(delivered) == len(chosen):
            lines.append(resized(torch.cat(delivered), lines[0]))
        grid = image_grid(torch.cat(lines), len(lines[0]))
        # As PNG, the grain of some methods takes half a megabyte per image.
        Image.fromarray(grid).save(docs / f"{name}-{dimension}.jpg", quality=90)
    if rows:
        save_png(labelled_rows(rows), out / f"sheet-{dimension}.png")


def views_of(asset: Tensor, dimension: str) -> Tensor:
    """Images shown for an asset: the image itself in 2D, every second view in 3D."""
    return asset if dimension == "2d" else asset[::2]


def labelled_rows(rows: dict[str, Tensor], strip: int = 14) -> np.ndarray:
    """Sheet (H, W, 3) uint8 with one row of images per method, below the method's name."""
    grids = {name: image_grid(images, len(images)) for name, images in rows.items()}
    width = max(grid.shape[1] for grid in grids.values())
    sheet = Image.new("RGB", (width, sum(grid.shape[0] + strip for grid in grids.values())), "white")
    top = 0
    for name, grid in grids.items():
        ImageDraw.Draw(sheet).text((2, top + 1), name, fill="black")
        sheet.paste(Image.fromarray(grid), (0, top + strip))
        top += grid.shape[0] + strip
    return np.asarray(sheet)
