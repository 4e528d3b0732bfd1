"""Reports on exports: one class per kind of product, and the report of a whole export that contains them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MeshReport:
    """Properties of an exported mesh.

    Attributes:
        faces: Number of faces after simplification.
        vertices: Number of vertices after simplification.
        watertight: Whether every edge has exactly two faces with consistent winding.
        holes: Number of connected groups of boundary edges.
        nonmanifold_edges: Number of edges with more than two faces.
        components: Number of connected components.
        dropped_components: Number of components removed as floaters.
        threshold: Density of the iso-surface; None if the object is a surface itself.
        density_range: Lowest and highest density on the sampling grid; None if the object is a surface itself.
        bounds: Lowest and highest corner of the bounding box, world coordinates (z up), scene units.
        scale: Meters per scene unit in the files.
        channels: Names of the baked textures.
    """

    faces: int
    vertices: int
    watertight: bool
    holes: int
    nonmanifold_edges: int
    components: int
    dropped_components: int
    threshold: float | None
    density_range: tuple[float, float] | None
    bounds: tuple[tuple[float, ...], tuple[float, ...]]
    scale: float = 1.0
    channels: tuple[str, ...] = ()

    def describe(self) -> str:
        """Summary in one phrase."""
        closed = "watertight" if self.watertight else f"{self.holes} holes, {self.nonmanifold_edges} non-manifold edges"
        return f"mesh: {self.faces:,} faces, {closed}, {self.components} pieces"


@dataclass(frozen=True)
class SplatReport:
    """Properties of an exported set of 3D Gaussians.

    Attributes:
        gaussians: Number of Gaussians.
        bounds: Lowest and highest corner of the box around their means, world coordinates (z up), scene units.
    """

    gaussians: int
    bounds: tuple[tuple[float, ...], tuple[float, ...]]

    def describe(self) -> str:
        """Summary in one phrase."""
        return f"splats: {self.gaussians:,} Gaussians"


@dataclass(frozen=True)
class ExportReport:
    """Report on one export: its files, its products and its warnings.

    Attributes:
        bytes: File size in bytes by file name.
        seconds: Wall time in seconds by stage.
        notes: Warnings, one sentence each.
        mesh: Report on the mesh; None if the export made none.
        splats: Report on the Gaussians; None if the export wrote none.
    """

    bytes: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    mesh: MeshReport | None = None
    splats: SplatReport | None = None

    @property
    def products(self) -> list[MeshReport | SplatReport]:
        """Reports on the products that the export made."""
        return [product for product in (self.mesh, self.splats) if product is not None]

    def to_dict(self) -> dict[str, Any]:
        """One flat JSON-compatible dictionary.

        The fields of the products are at the same level as those of the export. ``gaussians`` is always present; the
        other fields of a product are present only if it was made. If both products were made, ``bounds`` is that of the
        mesh.
        """
        fields: dict[str, Any] = {"gaussians": 0}
        for product in reversed(self.products):
            fields |= asdict(product)
        return fields | {"bytes": self.bytes, "seconds": self.seconds, "notes": self.notes}

    def describe(self) -> str:
        """Summary in one line for the console."""
        parts = [product.describe() for product in self.products]
        size = sum(self.bytes.values()) / 2**20
        return "; ".join([f"{', '.join(parts)}, {size:.1f} MiB in all", *self.notes])
