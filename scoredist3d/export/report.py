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
        genus: Number of handles, summed over the components: 0 for a sphere, 1 for a torus or a mug.
        mean_dihedral_deg: Mean angle between adjacent faces in degrees, weighted by edge length; 0 is flat.
        sharp_edges: Share, in [0, 1], of the edge length at which adjacent faces meet at more than 45 degrees.
        threshold: Density of the iso-surface; None if the object is a surface itself, or if its surface was fused from
            renders of the depth.
        density_range: Lowest and highest density on the sampling grid; None if the object is a surface itself.
        bounds: Lowest and highest corner of the bounding box, world coordinates (z up), scene units.
        scale: Meters per scene unit in the files.
        origin: World position of the files' origin, in scene units.
        channels: Names of the baked textures.
        filled_texels: Share, in [0, 1], of the texels on the mesh whose colors are diffused from elsewhere, because no
            training camera sees them; None if this was not examined.
        filled_tunnels: Number of tiny tunnels through the object that were filled; they do not count as handles.
    """

    faces: int
    vertices: int
    watertight: bool
    holes: int
    nonmanifold_edges: int
    components: int
    dropped_components: int
    genus: int
    mean_dihedral_deg: float
    sharp_edges: float
    threshold: float | None
    density_range: tuple[float, float] | None
    bounds: tuple[tuple[float, ...], tuple[float, ...]]
    scale: float = 1.0
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    channels: tuple[str, ...] = ()
    filled_texels: float | None = None
    filled_tunnels: int = 0

    def describe(self) -> str:
        """Summary in one phrase."""
        closed = "watertight" if self.watertight else f"{self.holes} holes, {self.nonmanifold_edges} non-manifold edges"
        dropped = f" ({self.dropped_components} more dropped)" if self.dropped_components else ""
        high = "" if self.scale == 1 else f", {self.scale * (self.bounds[1][2] - self.bounds[0][2]):.3g} m high"
        handles = f"genus {self.genus}" + (f" (filled tunnels: {self.filled_tunnels})" if self.filled_tunnels else "")
        filled = f", {100 * self.filled_texels:.1f} % of the texels unseen and filled" if self.filled_texels else ""
        return (
            f"mesh: {self.faces:,} faces{high}, {closed}, {self.components} pieces{dropped}, {handles}, "
            f"mean dihedral angle {self.mean_dihedral_deg:.1f} degrees ({100 * self.sharp_edges:.1f} % over 45){filled}"
        )


@dataclass(frozen=True)
class CheckReport:
    """Agreement of the views of an exported mesh with those of its object; shares are in [0, 1].

    Attributes:
        see_through: Share of the object's pixels in which the mesh is missing; None if the object cannot be rendered.
        off_depth: Share of the common pixels in which the depths differ by more than 0.08 radii; None as above.
        behind: Share of the common pixels in which the mesh is more than 0.08 radii behind the object; None as above.
        psnr: PSNR in dB of the mesh's colors against the object's, both without lighting and over white; None as
            above, or if the mesh has no colors.
        clipped_texels: Share of the texels on the mesh with a base color channel at 0 or 255; None without textures.
    """

    see_through: float | None = None
    off_depth: float | None = None
    behind: float | None = None
    psnr: float | None = None
    clipped_texels: float | None = None

    def describe(self) -> str:
        """Summary in one phrase; empty if nothing was measured."""
        parts = []
        if self.see_through is not None and self.off_depth is not None and self.behind is not None:
            off, behind = 100 * self.off_depth, 100 * self.behind
            parts += [f"see-through {100 * self.see_through:.1f} %", f"depth off {off:.1f} % (behind {behind:.1f} %)"]
        if self.psnr is not None:
            parts.append(f"PSNR {self.psnr:.1f} dB")
        if self.clipped_texels is not None:
            parts.append(f"clipped texels {100 * self.clipped_texels:.1f} %")
        return f"check: {', '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class SplatReport:
    """Properties of an exported set of 3D Gaussians.

    Attributes:
        gaussians: Number of Gaussians.
        bounds: Lowest and highest corner of the box around their means, world coordinates (z up), scene units.
        scale: Meters per scene unit in the file.
        origin: World position of the file's origin, in scene units.
    """

    gaussians: int
    bounds: tuple[tuple[float, ...], tuple[float, ...]]
    scale: float = 1.0
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)

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
        check: Comparison of the mesh with the object; None if the export made none.
    """

    bytes: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    mesh: MeshReport | None = None
    splats: SplatReport | None = None
    check: CheckReport | None = None

    @property
    def products(self) -> list[MeshReport | SplatReport]:
        """Reports on the products that the export made."""
        return [product for product in (self.mesh, self.splats) if product is not None]

    def to_dict(self) -> dict[str, Any]:
        """One flat JSON-compatible dictionary.

        The fields of the products and of the comparison are at the same level as those of the export. ``gaussians`` is
        always present; the other fields are present only if the product or the comparison was made. If both products
        were made, ``bounds``, ``scale`` and ``origin`` are those of the mesh.
        """
        fields: dict[str, Any] = {"gaussians": 0}
        for product in reversed(self.products):
            fields |= asdict(product)
        if self.check is not None:
            fields |= asdict(self.check)
        return fields | {"bytes": self.bytes, "seconds": self.seconds, "notes": self.notes}

    def describe(self) -> str:
        """Summary in one line for the console, without the warnings, which were logged when they arose."""
        parts = [product.describe() for product in self.products]
        size = sum(self.bytes.values()) / 2**20
        check = "" if self.check is None else self.check.describe()
        return "; ".join([f"{', '.join(parts)}, {size:.1f} MiB in all", *([check] if check else [])])
