"""Comparison of an exported mesh with its object: one picture, and figures for the report."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.evaluation.fidelity import coverage, psnr
from scoredist3d.export.drawing import MeshViews, draw_mesh
from scoredist3d.export.images import row_grid
from scoredist3d.export.products import ColoredSurfaceProduct, Product, SurfaceProduct, TexturedProduct
from scoredist3d.export.report import CheckReport
from scoredist3d.meshes.exportable import Exportable, HasViews, ObjectViews

CHECK_SUFFIX = "-check.png"
SIZE = 256  # pixels of each view
DEPTH_TOLERANCE = 0.08  # in units of the object's radius
# Azimuth and elevation of the views in degrees. The last one shows the object from below.
_VIEWS = ((0.0, 10.0), (60.0, 35.0), (120.0, 10.0), (180.0, 60.0), (240.0, 10.0), (300.0, -15.0))
# The ball of the object's radius fills the image.
_DISTANCE, _FOVY_DEG = 3.2, 40.0


def check_cameras(radius: float, size: int = SIZE) -> Cameras:
    """The 6 cameras of the comparison, around a ball of ``radius`` at the origin."""
    azimuth, elevation = torch.tensor(_VIEWS).unbind(dim=1)
    ones = torch.ones(len(_VIEWS))
    return orbit(azimuth, elevation, _DISTANCE * radius * ones, _FOVY_DEG * ones, size, size)


@torch.no_grad()
def check_mesh(shape: Exportable, product: Product, *, size: int = SIZE) -> tuple[np.ndarray, CheckReport]:
    """Compare an exported mesh with its object.

    Args:
        shape: The object. Its own views are part of the comparison if it is a
            :class:`~scoredist3d.meshes.exportable.HasViews`.
        product: The mesh, with textures, vertex colors, or neither.
        size: Side length of each view, in pixels.

    Returns:
        A labeled grid of views, (H, W, 3) uint8, with one row for each kind of image and one column per camera, and
        the figures.
    """
    if not isinstance(product, SurfaceProduct | TexturedProduct):
        raise TypeError(f"{type(product).__name__} has no mesh to compare with the object")
    textured = product if isinstance(product, TexturedProduct) else None
    cameras = check_cameras(shape.radius, size).to(shape.device)
    views = shape.views(cameras) if isinstance(shape, HasViews) else None
    unlit = textured is not None and textured.unlit
    textures = None if textured is None else textured.textures
    drawn = draw_mesh(product.mesh, textures, cameras, shape.radius, lit=not unlit)
    own = "field" if shape.surface() is None else "scene"
    picture = row_grid(_rows(own, views, drawn))
    clipped = None if textures is None else textures.clipped_share
    return picture, _report(views, drawn, shape.radius, clipped)


def best_mesh(products: dict[type, Product]) -> Product:
    """The product with the most complete mesh: textured, else with vertex colors, else plain."""
    return next(products[kind] for kind in (TexturedProduct, ColoredSurfaceProduct, SurfaceProduct) if kind in products)


def _rows(own: str, views: ObjectViews | None, drawn: MeshViews) -> dict[str, Tensor]:
    """Images of each row by label; ``own`` is the word for the object."""
    rows = {}
    if views is not None:
        rows[f"{own}, with its own light" if views.lit else own] = views.rgb
    if drawn.lit is not None:
        rows["mesh, neutral light"] = drawn.lit
    elif drawn.base_color is not None:
        rows["mesh, unlit"] = drawn.base_color
    return rows | {"mesh without colors": drawn.gray, "shading normals of the mesh": drawn.normals}


def _report(views: ObjectViews | None, drawn: MeshViews, radius: float, clipped: float | None) -> CheckReport:
    if views is None:
        return CheckReport(clipped_texels=clipped)
    found = coverage(drawn.opacity, drawn.depth, views.opacity, views.depth, tolerance=DEPTH_TOLERANCE * radius)
    return CheckReport(
        see_through=found.see_through,
        off_depth=found.off_depth,
        behind=found.behind,
        psnr=None if drawn.base_color is None else psnr(drawn.base_color, views.base_color),
        clipped_texels=clipped,
    )
