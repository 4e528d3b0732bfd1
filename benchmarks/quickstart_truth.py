"""A delivered mesh beside the true object: figures and pictures of the benchmark ``quickstart_quality.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.evaluation.fidelity import coverage, psnr, ssim
from scoredist3d.evaluation.measures import chroma
from scoredist3d.evaluation.nearest_object import DEFAULT_EFFORT, Effort, nearest_object
from scoredist3d.evaluation.surface_distance import normal_angle_deg
from scoredist3d.evaluation.true_objects import RADIUS, Stated, object_mesh, object_views
from scoredist3d.export.check import DEPTH_TOLERANCE
from scoredist3d.export.delivered import Delivered, read_delivered
from scoredist3d.export.diagnostics import SHARP_DEG
from scoredist3d.export.drawing import MeshViews
from scoredist3d.export.exporter import DEFAULT_FACES, DEFAULT_LEAST_VOLUME
from scoredist3d.export.images import image_grid, row_grid
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.quality import dihedrals, genus
from scoredist3d.ops.shading.directional import DEFAULT_LIGHT, directional_lighting
from scoredist3d.procedural import CATEGORIES, PATTERNS, Objects
from scoredist3d.procedural.probe import Probe, ProbeReading

if TYPE_CHECKING:
    from scoredist3d.config.experiment import ExperimentConfig


@dataclass(frozen=True)
class Comparison:
    """A delivered mesh and the true object.

    Attributes:
        figures: Differences of both, and the properties of each under the keys ``ours`` and ``true``.
        ours: (V, H, W, 3), the delivered mesh over white.
        truth: (V, H, W, 3), the true object from the same cameras.
    """

    figures: dict[str, Any]
    ours: Tensor
    truth: Tensor

    def picture(self, label: str) -> np.ndarray:
        """Both rows of images, the delivered mesh above the true object, as one uint8 image."""
        return row_grid({f"{label}: delivered GLB": self.ours, f"{label}: true object": self.truth})


class ExportedGlb(NamedTuple):
    """GLB file of a run's first object.

    Attributes:
        delivered: The mesh, read back from the file.
        report: Report on the export.
        bytes: Size of the file.
    """

    delivered: Delivered
    report: dict[str, Any]
    bytes: int


def exported_glb(folder: Path) -> ExportedGlb:
    """GLB file of a run's folder ``export``.

    Raises:
        ValueError: No GLB was exported.
    """
    report = json.loads((folder / "report.json").read_text())
    name = next((name for name in report["bytes"] if name.endswith(".glb")), None)
    if name is None:
        raise ValueError(f"{folder} has no GLB: exporter.formats must contain glb")
    delivered = read_delivered(folder / name, scale=report["scale"], origin=report.get("origin", (0.0, 0.0, 0.0)))
    return ExportedGlb(delivered, report, report["bytes"][name])


def compare_with_truth(
    delivered: Delivered,
    config: ExperimentConfig,
    outlines: Cameras,
    cameras: Cameras,
    probe: Probe,
    *,
    member: Objects | None = None,
) -> Comparison:
    """Compare a run's delivered mesh with its true object, whose mesh is extracted and simplified as that of the run.

    Args:
        delivered: The mesh.
        config: The config of the run; its prompt is one that :func:`true_object` accepts.
        outlines: The cameras from which the true object is found.
        cameras: The cameras from which both are compared, on the same device.
        probe: The probe, on the same device.
        member: The true object, if it is known.

    Raises:
        ValueError: The prompt has another form or states no color, or the mesh has no colors or is not seen.
    """
    exporter: Any = config.exporter
    return compare(
        delivered,
        true_object(delivered, config.prompt, outlines) if member is None else member,
        cameras,
        probe,
        resolution=exporter.resolution,
        max_faces=exporter.max_faces or DEFAULT_FACES,
    )


def true_object(delivered: Delivered, prompt: str, cameras: Cameras, *, effort: Effort = DEFAULT_EFFORT) -> Objects:
    """The true object of a delivered mesh, a batch of one: the nearest one that is what the prompt says.

    Args:
        delivered: The mesh.
        prompt: One that :class:`~scoredist3d.evaluation.true_objects.Stated` reads.
        cameras: The cameras from which the depths are compared, on the device of the result.
        effort: How long the search takes.

    Raises:
        ValueError: The prompt has another form or states no color, or the mesh is not seen.
    """
    stated, drawn = Stated.of(prompt), delivered.views(cameras)
    opacity, depth = drawn.opacity[..., 0], drawn.depth[..., 0]
    return nearest_object(opacity, depth, cameras, stated.category, stated.look, effort=effort).member


@torch.no_grad()
def compare(
    delivered: Delivered, member: Objects, cameras: Cameras, probe: Probe, *, resolution: int, max_faces: int
) -> Comparison:
    """Compare a delivered mesh with the true object.

    Both are shown under the light of the prior's training data, which the colors of an unlit file include already.

    Args:
        delivered: The mesh, with colors.
        member: The true object, a batch of one.
        cameras: The cameras, on the device of the object.
        probe: The probe, on the same device.
        resolution: Samples along each side of the cube from which the mesh of the true object is extracted.
        max_faces: Maximum number of faces of that mesh.

    Raises:
        ValueError: The file has no colors.
    """
    drawn = delivered.views(cameras)
    ours = pictures(delivered, drawn)
    render = object_views(member, cameras)
    opacity, depth = render.rgba[..., 3:], render.depth[..., None]
    truth = render.over(opacity.new_ones(3)).clamp(0.0, 1.0)
    found = coverage(drawn.opacity, drawn.depth, opacity, depth, tolerance=DEPTH_TOLERANCE * RADIUS)
    true_mesh = object_mesh(member, resolution=resolution, max_faces=max_faces, least_volume=DEFAULT_LEAST_VOLUME)
    figures = {
        "psnr": psnr(ours, truth),
        "ssim": ssim(ours, truth),
        "feature_distance": float((probe(ours).features - probe(truth).features).norm(dim=1).mean()),
        "normal_angle_deg": normal_angle_deg(delivered.mesh, true_mesh),
        "off_depth": found.off_depth,
        "see_through": found.see_through,
        "clipped_texels": None if delivered.textures is None else delivered.textures.clipped_share,
        "ours": _surface(delivered.mesh) | {"saturation": chroma(ours, drawn.opacity)},
        "true": _surface(true_mesh) | {"saturation": chroma(truth, opacity)},
    }
    return Comparison(figures, ours, truth)


def pictures(delivered: Delivered, drawn: MeshViews) -> Tensor:
    """Images (V, H, W, 3) of a delivered mesh from its views, over white, under the light of the training data.

    Raises:
        ValueError: The file has no colors.
    """
    if drawn.base_color is None:
        raise ValueError("the file has neither a texture nor vertex colors, so there is nothing to compare")
    return drawn.base_color if delivered.unlit else _in_training_light(drawn.base_color, drawn)


def _in_training_light(base_color: Tensor, drawn: MeshViews) -> Tensor:
    """The views (V, H, W, 3) of a mesh under the light of the training data, over white."""
    visible, behind = drawn.opacity.clamp_min(1e-6), 1.0 - drawn.opacity
    normals = torch.nn.functional.normalize(2.0 * (drawn.normals - behind) / visible - 1.0, dim=-1)
    light = torch.nn.functional.normalize(normals.new_tensor(DEFAULT_LIGHT), dim=0)
    color = (base_color - behind) / visible * directional_lighting(normals, light)[..., None]
    return (color.clamp(0.0, 1.0) * drawn.opacity + behind).clamp(0.0, 1.0)


def _surface(mesh: Mesh) -> dict[str, Any]:
    creases = dihedrals(mesh)
    return {
        "faces": len(mesh.faces),
        "genus": genus(mesh),
        "mean_dihedral_deg": creases.mean_deg,
        "sharp_edges": creases.share_above(SHARP_DEG),
    }


def shares(reading: ProbeReading, stated: Stated) -> dict[str, float | None]:
    """Shares of the images whose category, color and pattern, as the probe reads them, are those of the prompt.

    The share of the pattern is None if the prompt names no pattern.
    """
    right = {"category": CATEGORIES.index(stated.category), "color": stated.look["color"]}
    if stated.pattern != PATTERNS[0]:
        right["pattern"] = stated.look["pattern"]
    found = {name: (getattr(reading, name).argmax(-1) == value).float().mean().item() for name, value in right.items()}
    return {"pattern": None, **found}


def mean_of(rows: Sequence[dict[str, Any]], key: str, part: str | None = None) -> float:
    """Mean of a figure, which is in the block ``part`` of each row if given, over the rows that have it."""
    values = [value for row in rows if (value := (row if part is None else row[part])[key]) is not None]
    return sum(values) / len(values)


def beside(rows: Sequence[dict[str, Any]]) -> str:
    """A sentence with the means of the figures of several assets."""
    mean = partial(mean_of, rows)
    return (
        f"Beside the true objects: PSNR {mean('psnr'):.1f} dB, SSIM {mean('ssim'):.3f}, normals "
        f"{mean('normal_angle_deg'):.1f} degrees apart, depth off in {100 * mean('off_depth'):.1f} % of the pixels; "
        f"mean dihedral angle {mean('mean_dihedral_deg', 'ours'):.1f} degrees (true "
        f"{mean('mean_dihedral_deg', 'true'):.1f}), saturation {mean('saturation', 'ours'):.2f} (true "
        f"{mean('saturation', 'true'):.2f})."
    )


def sheet_of(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The pictures of several assets as one image, (H, W, 3) uint8."""
    return image_grid(list(pictures), columns=1 if len(pictures) <= 6 else 3, gap=8)


COLUMNS = (
    "PSNR",
    "SSIM",
    "features",
    "normals (deg)",
    "depth off (%)",
    "dihedral (deg)",
    "edges over 45 deg (%)",
    "genus",
    "saturation",
    "clipped texels (%)",
)


def cells(figures: dict[str, Any]) -> list[str]:
    """The figures of one asset in the order of ``COLUMNS``; "a / b" is the delivered mesh and the true object."""
    ours, true, clipped = figures["ours"], figures["true"], figures["clipped_texels"]
    return [
        f"{figures['psnr']:.1f}",
        f"{figures['ssim']:.3f}",
        f"{figures['feature_distance']:.2f}",
        f"{figures['normal_angle_deg']:.1f}",
        f"{100 * figures['off_depth']:.1f}",
        f"{ours['mean_dihedral_deg']:.1f} / {true['mean_dihedral_deg']:.1f}",
        f"{100 * ours['sharp_edges']:.1f} / {100 * true['sharp_edges']:.1f}",
        f"{ours['genus']} / {true['genus']}",
        f"{ours['saturation']:.2f} / {true['saturation']:.2f}",
        "-" if clipped is None else f"{100 * clipped:.1f}",
    ]
