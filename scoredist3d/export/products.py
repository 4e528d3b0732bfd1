"""Products of an export: the data that an exporter makes from an object for the writers of file formats.

All products are in world coordinates (z up) and scene units; a writer applies the ``frame`` to get the file's axes and
unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from scoredist3d.export.bake import Textures
from scoredist3d.export.frame import Y_UP, Frame
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.splats import Splats


@dataclass(frozen=True)
class SurfaceProduct:
    """The surface before simplification, without colors.

    Attributes:
        mesh: Vertices and faces.
        frame: Axes and unit of the file.
    """

    mesh: Mesh
    frame: Frame


@dataclass(frozen=True)
class ColoredSurfaceProduct(SurfaceProduct):
    """The surface before simplification; ``mesh.vertex_colors`` is set."""


@dataclass(frozen=True)
class TexturedProduct:
    """The simplified mesh with texture coordinates and baked textures.

    Attributes:
        mesh: Mesh with ``uvs`` and ``uv_faces``.
        textures: Textures in the layout of the texture coordinates.
        frame: Axes and unit of the file. Formats that are always y up use only its unit and origin.
        double_sided: Whether both sides of the faces should be visible, because the surface is open.
        unlit: Whether viewers should show the colors without lighting them.
    """

    mesh: Mesh
    textures: Textures
    frame: Frame
    double_sided: bool = False
    unlit: bool = False


@dataclass(frozen=True)
class SplatProduct:
    """The object as 3D Gaussians.

    Attributes:
        splats: The Gaussians.
        frame: Unit and origin of the file. Formats that are always y up use only these.
    """

    splats: Splats
    frame: Frame = Y_UP


Product = SurfaceProduct | ColoredSurfaceProduct | TexturedProduct | SplatProduct
