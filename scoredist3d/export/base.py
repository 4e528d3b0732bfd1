"""What an exporter is and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scoredist3d.config import ComponentConfig
from scoredist3d.meshes.exportable import Exportable

StageProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class ExportReport:
    """What came out.

    Attributes:
        faces, vertices: Of the exported, simplified surface.
        watertight: Every edge has exactly two faces, which agree about the winding.
        holes: Connected groups of boundary edges.
        nonmanifold_edges: Edges with more than two faces.
        components: Connected pieces of surface.
        dropped_components: Pieces removed as floaters.
        threshold: Density of the iso-surface; None where the object is a surface itself.
        density_range: Smallest and largest density seen on the grid; None likewise.
        bounds: Lowest and highest corner, world coordinates (z up), scene units.
        bytes: File name to size.
        seconds: Stage to wall time.
        notes: Sentences about anything unusual, e.g. a fallback.
        scale: Metres per scene unit in the files.
        channels: Textures that were baked.
        gaussians: Of a splat file; 0 where none was written.
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
    bytes: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...]
    scale: float = 1.0
    channels: tuple[str, ...] = ()
    gaussians: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """One line for a person."""
        closed = "watertight" if self.watertight else f"{self.holes} holes, {self.nonmanifold_edges} non-manifold edges"
        parts = [f"mesh: {self.faces:,} faces, {closed}, {self.components} pieces"] if self.faces else []
        parts += [f"splats: {self.gaussians:,} Gaussians"] if self.gaussians else []
        size = sum(self.bytes.values()) / 2**20
        return "; ".join([f"{', '.join(parts)}, {size:.1f} MiB in all", *self.notes])


@dataclass(frozen=True)
class ExportResult:
    """Files written, and the report about them."""

    paths: list[Path]
    report: ExportReport


class Exporter(ABC):
    """Turns a shape into files."""

    @dataclass
    class Config(ComponentConfig):
        """Options of the concrete exporter."""

    @abstractmethod
    def export(self, shape: Exportable, folder: Path, name: str, progress: StageProgress | None = None) -> ExportResult:
        """Write the object into ``folder`` under ``name`` with the formats' suffixes.

        Args:
            shape: What to export.
            folder: Made if absent. Either all files appear in it or none.
            name: Reduced to ASCII letters, digits, dots, dashes and underscores.
            progress: Called with a stage's name and its fraction done.

        Raises:
            ValueError: Nothing to export, or a shape that gives impossible values; says which setting to change.
        """
