"""The default exporter: a textured triangle mesh."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scoredist3d.config import option
from scoredist3d.export.bake import bake_texture, quantize
from scoredist3d.export.base import Exporter, ExportReport, ExportResult, StageProgress
from scoredist3d.export.files import safe_name, staged_files
from scoredist3d.export.gltf import write_glb, write_ply
from scoredist3d.export.obj import write_obj
from scoredist3d.meshes.mesh import decimate, drop_small_components, smooth, topology
from scoredist3d.meshes.shape import Shape, query_color
from scoredist3d.meshes.surface import FoundSurface, find_surface
from scoredist3d.meshes.uv import unwrap
from scoredist3d.registry import register

logger = logging.getLogger(__name__)


@register("exporter", "textured-mesh", summary="Iso-surface of the density with the colour baked into a texture.")
class TexturedMeshExporter(Exporter):
    """Density grid -> marching cubes -> clean-up -> decimation -> UV atlas -> baked texture -> files.

    All files are y up with the object's front towards +z, whatever the format.
    """

    @dataclass
    class Config(Exporter.Config):
        """Quality, size and formats."""

        formats: list[Literal["glb", "obj", "ply"]] = option(
            ["glb", "obj"], "Files to write. ply holds the surface before simplification, coloured at its vertices."
        )
        resolution: int = option(128, "Density samples along each side of the cube around the ball.", ge=8, le=1024)
        threshold: Literal["auto"] | float = option(
            "auto", "Density of the surface; auto puts the surface where the renderer shows it.", gt=0
        )
        max_faces: int = option(10000, "Face budget; unwrapping takes longer than linearly in it.", ge=16, le=200000)
        texture_size: int = option(1024, "Side of the texture in texels.", ge=32, le=8192)
        min_component_volume: float = option(
            0.02, "Pieces smaller than this fraction of the largest one are dropped; 1 keeps only that one.", ge=0, le=1
        )
        fill_cavities: bool = option(True, "Make empty space that no outside view can reach solid.")
        refine_steps: int = option(4, "Bisections of each vertex along its grid edge, with new densities.", ge=0, le=16)
        smoothing: int = option(0, "Taubin smoothing steps before simplification, for noisy surfaces.", ge=0, le=200)
        unlit: bool = option(
            False,
            "Mark the GLB as unlit, for colours that hold their shading already (material no-material): viewers then "
            "show them as they are and add no light of their own.",
        )
        padding: int = option(4, "Texels between the pieces of the texture.", ge=0, le=64)
        unwrap_timeout: float = option(60.0, "Seconds for xatlas; then each face gets its own piece of texture.", ge=0)
        chunk: int = option(131072, "Points per query of the object.", ge=1)

        def validate(self) -> list[str]:
            """An export without a format would do the work and write nothing."""
            return [] if self.formats else ["formats: at least one of glb, obj, ply is needed"]

    def __init__(self, config: Config, **runtime: Any) -> None:
        self.config = config

    def export(self, shape: Shape, folder: Path, name: str, progress: StageProgress | None = None) -> ExportResult:
        """See :meth:`Exporter.export`."""
        config, clock, name = self.config, _Stages(progress), safe_name(name)
        notes: list[str] = []
        with clock.stage("surface") as step:
            found, dropped = self._surface(shape, step)
            surface = found.mesh
        with clock.stage("simplify"):
            # Parting pinched walls can leave crumbs.
            mesh, _ = drop_small_components(decimate(surface, config.max_faces), config.min_component_volume)
            closed = topology(mesh)
        wants_texture = bool({"glb", "obj"} & set(config.formats))
        if wants_texture:
            with clock.stage("unwrap"):
                mesh, note = unwrap(mesh, config.texture_size, padding=config.padding, timeout=config.unwrap_timeout)
                notes += [note] if note else []
            with clock.stage("texture") as step:
                texture = bake_texture(shape, mesh, config.texture_size, chunk=config.chunk, progress=step)
        with clock.stage("write"), staged_files(Path(folder)) as (staging, paths):
            if "obj" in config.formats:
                paths += write_obj(staging, name, mesh, texture)
            if "glb" in config.formats:
                paths.append(staging / f"{name}.glb")
                write_glb(paths[-1], mesh, texture, name, unlit=config.unlit)
            if "ply" in config.formats:
                paths.append(staging / f"{name}.ply")
                colors = quantize(query_color(shape, surface.vertices, chunk=config.chunk))
                write_ply(paths[-1], replace(surface, vertex_colors=colors))
        if not closed.watertight:
            notes.append(
                f"the surface is not watertight: {closed.holes} holes, {closed.nonmanifold_edges} edges with more than "
                "two faces; exporter.smoothing or another exporter.max_faces may help"
            )
            logger.warning(notes[-1])
        low, high = mesh.bounds
        report = ExportReport(
            faces=len(mesh.faces),
            vertices=len(mesh.vertices),
            watertight=closed.watertight,
            holes=closed.holes,
            nonmanifold_edges=closed.nonmanifold_edges,
            components=closed.components,
            dropped_components=dropped,
            threshold=found.threshold,
            density_range=found.density_range,
            bounds=(tuple(low.tolist()), tuple(high.tolist())),
            bytes={path.name: path.stat().st_size for path in paths},
            seconds=clock.seconds,
            notes=tuple(notes),
        )
        return ExportResult(paths=paths, report=report)

    def _surface(self, shape: Shape, progress: Callable[[float], None]) -> tuple[FoundSurface, int]:
        """The cleaned surface before simplification, and the number of floaters dropped."""
        config = self.config
        found = find_surface(
            shape,
            config.resolution,
            threshold=None if config.threshold == "auto" else config.threshold,
            fill_cavities=config.fill_cavities,
            refine_steps=config.refine_steps,
            chunk=config.chunk,
            progress=progress,
        )
        surface, dropped = drop_small_components(found.mesh, config.min_component_volume)
        if config.smoothing:
            surface = smooth(surface, config.smoothing)
        return replace(found, mesh=surface), dropped


class _Stages:
    """Times the stages and forwards their progress."""

    def __init__(self, progress: StageProgress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        """Yields a callable that takes the stage's fraction done; 0 and 1 are reported by themselves."""

        def report(fraction: float) -> None:
            if self.progress is not None:
                self.progress(name, fraction)

        start = time.perf_counter()
        report(0.0)
        yield report
        self.seconds[name] = round(time.perf_counter() - start, 3)
        report(1.0)
