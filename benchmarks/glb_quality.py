#!/usr/bin/env python
"""Quality of GLB files of any origin, whose names are prompts: each file beside its true object.

    python benchmarks/glb_quality.py --out outputs/glb outputs/quickstart/*/refine/export/*.glb
    python benchmarks/glb_quality.py --out outputs/glb a-red-mug.glb a-gray-robot.glb

The measures are those of ``quickstart_quality.py``. Unlike that script, this one needs nothing but the files, so it can
measure those of other versions of the project. The object must fit into the ball of radius 1 around the origin, with
its front towards +z and its top towards +y in the coordinates of glTF. The probe reads category and color from 8
held-out views over white, under the light of the prior's training data.

Writes ``glb.md``, ``glb.json`` and ``sheet.png``, which shows each file above its true object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from quickstart_quality import TRUTH_SIZE, held_out, outlines
from quickstart_truth import COLUMNS, Comparison, beside, cells, compare, shares, sheet_of, true_object

from scoredist3d.evaluation.true_objects import Stated
from scoredist3d.export.delivered import read_delivered
from scoredist3d.export.exporter import DEFAULT_FACES
from scoredist3d.export.images import save_png
from scoredist3d.procedural.probe import Probe

RESOLUTION = 128  # of the mesh of the true object, as in the recipes


@torch.no_grad()
def measured(path: Path, probe: Probe, device: torch.device) -> Comparison:
    """A GLB file beside its true object; the figures include the shares of views with the right category and color."""
    prompt = path.stem.replace("-", " ")
    delivered, stated = read_delivered(path), Stated.of(prompt)
    member = true_object(delivered, prompt, outlines(device))
    cameras = held_out(TRUTH_SIZE, device)
    result = compare(delivered, member, cameras, probe, resolution=RESOLUTION, max_faces=DEFAULT_FACES)
    result.figures.update({"file": str(path), "prompt": prompt, **shares(probe(result.ours), stated)})
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table with their means."""
    columns = ["prompt", "category", "color", *COLUMNS]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    lines += [
        f"| {row['prompt']} | {row['category']:.2f} | {row['color']:.2f} | {' | '.join(cells(row))} |" for row in rows
    ]

    category, color = (sum(row[name] for row in rows) / len(rows) for name in ("category", "color"))
    summary = f"{len(rows)} files: category {category:.3f}, color {color:.3f}. {beside(rows)}"
    return "\n".join([*lines, "", summary]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure the files and write the results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="GLB files, whose names are prompts such as a-red-mug.glb")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    probe = Probe.load(device=device)
    rows, pictures = [], []
    for path in arguments.files:
        result = measured(path, probe, device)
        rows.append(result.figures)
        pictures.append(result.picture(result.figures["prompt"]))
        print(f"{path.stem}: {' | '.join(cells(result.figures))}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "glb.md").write_text(table(rows))
    (arguments.out / "glb.json").write_text(json.dumps(rows, indent=2) + "\n")
    save_png(sheet_of(pictures), arguments.out / "sheet.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
