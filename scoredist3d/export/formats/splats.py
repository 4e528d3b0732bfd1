"""PLY of 3D Gaussians, in the layout described in :mod:`scoredist3d.meshes.splats`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from scoredist3d.export.formats.base import register_format
from scoredist3d.export.products import SplatProduct
from scoredist3d.meshes.splats import Splats, splat_properties
from scoredist3d.ops.shading.spherical_harmonics import DC

_LEAST_OPACITY = 1e-6  # keeps logits finite


@register_format(
    "splats",
    suffix="-splats.ply",
    needs=SplatProduct,
    summary="PLY of 3D Gaussians, for objects made of them.",
)
def write_splat_product(path: Path, product: SplatProduct) -> list[Path]:
    """Write the Gaussians of a product as a PLY file, in its unit and around its origin; see :func:`write_splats`."""
    write_splats(path, product.splats.moved(product.frame.origin, product.frame.scale))
    return [path]


def write_splats(path: Path | str, splats: Splats) -> None:
    """Write Gaussians to a PLY file, y up.

    The file is written directly; callers that need an atomic write must stage it.

    Raises:
        ValueError: The number of spherical-harmonic coefficients does not match a degree from 0 to 3.
    """
    kept = 0 if splats.harmonics is None else splats.harmonics.shape[1]
    if kept not in (0, 3, 8, 15):
        raise ValueError(f"splats: harmonics must have 3, 8 or 15 coefficients per channel, got {kept}")
    turned = splats.to_y_up()
    means = turned.means
    columns = {"xyz": means, "normal": torch.zeros_like(means), "dc": (turned.colors - 0.5) / DC}
    if turned.harmonics is not None:
        columns["rest"] = turned.harmonics.transpose(1, 2).flatten(1)
    columns["opacity"] = torch.logit(turned.opacities, eps=_LEAST_OPACITY)[:, None]
    columns["scales"] = turned.scales.log()
    columns["rotations"] = F.normalize(turned.quaternions, dim=-1)
    table = torch.cat([column.detach().float().cpu() for column in columns.values()], dim=1).numpy()
    header = ["ply", "format binary_little_endian 1.0", "comment y up", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in splat_properties(splats.degree)]
    with Path(path).open("wb") as file:
        file.write(("\n".join([*header, "end_header"]) + "\n").encode("ascii"))
        file.write(np.ascontiguousarray(table, dtype="<f4").tobytes())
