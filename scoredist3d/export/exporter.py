"""The default exporter: a textured triangle mesh."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from scoredist3d.config import option
from scoredist3d.export.bake import Textures, bake_textures, quantize
from scoredist3d.export.base import Exporter, ExportReport, ExportResult, StageProgress
from scoredist3d.export.diagnostics import findings, mesh_report, metres, not_closed
from scoredist3d.export.files import safe_name, staged_files
from scoredist3d.export.formats.gltf import write_glb
from scoredist3d.export.formats.obj import write_obj
from scoredist3d.export.formats.plain import write_ply, write_stl
from scoredist3d.export.formats.usdz import usdz_problem, write_usdz
from scoredist3d.export.frame import Frame
from scoredist3d.meshes.exportable import Shape, query_color
from scoredist3d.meshes.holes import fill_holes
from scoredist3d.meshes.isosurface_extraction import FoundSurface, find_surface
from scoredist3d.meshes.mesh import Mesh, decimate, drop_small_components, smooth, topology
from scoredist3d.meshes.splats import Splats, write_splats
from scoredist3d.meshes.uv import unusable_uvs, unwrap
from scoredist3d.registry import register

logger = logging.getLogger(__name__)

_TEXTURED = {"glb", "obj", "usdz"}
_MESHES = _TEXTURED | {"ply", "stl"}
DEFAULT_FACES = 10000
DEFAULT_LEAST_VOLUME = 0.02


@register(
    "exporter", "textured-mesh", summary="Surface of the object with its look baked into textures, or its splats."
)
class TexturedMeshExporter(Exporter):
    """Density grid -> marching cubes -> clean-up -> decimation -> UV atlas -> baked textures -> files.

    An object that is a surface already starts at the clean-up. A user's own mesh keeps all its faces unless an option
    asks for fewer, and usable texture coordinates are kept as long as the faces stay the same. By default all files are
    y up with the object's front towards +z, whatever the format.
    """

    @dataclass
    class Config(Exporter.Config):
        """Quality, size and formats."""

        formats: list[Literal["glb", "obj", "ply", "stl", "usdz", "splats"]] = option(
            ["glb", "obj"],
            "Files to write. ply and stl hold the surface before simplification, ply with colours at its vertices; "
            "usdz needs the package usd-core; splats is a PLY of Gaussians, for objects made of them.",
        )
        resolution: int = option(128, "Density samples along each side of the cube around the ball.", ge=8, le=1024)
        threshold: Literal["auto"] | float = option(
            "auto", "Density of the surface; auto puts the surface where the renderer shows it.", gt=0
        )
        max_faces: int | None = option(
            None,
            f"Face budget; unwrapping takes longer than linearly in it. By default {DEFAULT_FACES}, and none for a "
            "mesh of your own.",
            ge=16,
            le=200000,
        )
        texture_size: int = option(1024, "Side of the textures in texels.", ge=32, le=8192)
        min_component_volume: float | None = option(
            None,
            "Pieces smaller than this fraction of the largest one are dropped; 1 keeps only that one. By default "
            f"{DEFAULT_LEAST_VOLUME}, and a mesh with texture coordinates or of your own keeps all its pieces.",
            ge=0,
            le=1,
        )
        largest_component: bool = option(False, "Keep only the largest piece; the same as min_component_volume=1.")
        fill_cavities: bool = option(True, "Make empty space that no outside view can reach solid.")
        fill_holes: bool = option(
            False, "Close holes of the surface before simplification, for surfaces that are open."
        )
        refine_steps: int = option(4, "Bisections of each vertex along its grid edge, with new densities.", ge=0, le=16)
        smoothing: int = option(0, "Taubin smoothing steps before simplification, for noisy surfaces.", ge=0, le=200)
        normal_map: Literal["auto", "surface", "none"] = option(
            "auto",
            "auto bakes the material's shading normals where it has any; surface those of the surface before "
            "simplification, bent as the material says; none bakes none.",
        )
        occlusion: bool = option(False, "Bake ambient occlusion, of the simplified surface by itself.")
        unlit: Literal["auto"] | bool = option(
            "auto",
            "Mark the GLB as unlit: viewers then show the colours as they are and add no light of their own. auto does "
            "so where the material's colours include the light (no-material, neural-radiance, spherical-harmonics, "
            "latent).",
        )
        scale: float = option(1.0, "Metres per scene unit.", gt=0)
        height: float | None = option(None, "Height of the object in metres; takes the place of scale.", gt=0)
        up_axis: Literal["y", "z"] = option(
            "y",
            "Upward axis of obj, ply and stl files; z keeps the world's axes. glb and usdz are y up, as splats are.",
        )
        padding: int = option(4, "Texels between the pieces of the texture.", ge=0, le=64)
        unwrap_timeout: float = option(60.0, "Seconds for xatlas; then each face gets its own piece of texture.", ge=0)
        chunk: int = option(131072, "Points per query of the object.", ge=1)

        def validate(self) -> list[str]:
            """An export without a format would do the work and write nothing."""
            return [] if self.formats else ["formats: at least one of glb, obj, ply, stl, usdz, splats is needed"]

    def __init__(self, config: Config) -> None:
        self.config = config

    def export(self, shape: Shape, folder: Path, name: str, progress: StageProgress | None = None) -> ExportResult:
        """See :meth:`Exporter.export`."""
        clock, name, notes = _Stages(progress), safe_name(name), _Notes()
        splats = self._splats(shape, notes)
        made = self._make(shape, notes, clock) if self._wants(_MESHES) else None
        with clock.stage("write"), staged_files(Path(folder)) as (staging, paths):
            if made is not None:
                self._write(staging, paths, name, made)
            if splats is not None:
                paths.append(staging / f"{name}-splats.ply")
                write_splats(paths[-1], splats)
        report = _splat_report(splats) if made is None else made.report
        sizes = {path.name: path.stat().st_size for path in paths}
        gaussians = 0 if splats is None else len(splats.means)
        report = replace(report, bytes=sizes, seconds=clock.seconds, notes=tuple(notes), gaussians=gaussians)
        return ExportResult(paths=paths, report=report)

    def _wants(self, formats: set[str]) -> bool:
        return bool(formats & set(self.config.formats))

    def _splats(self, shape: Shape, notes: _Notes) -> Splats | None:
        """The Gaussians if they are wanted; what can go wrong is found out before any work is done.

        Raises:
            ValueError: A format needs a missing package, or the only one is splats and there are none.
        """
        if self._wants({"usdz"}) and (problem := usdz_problem()):
            raise ValueError(problem)
        if not self._wants({"splats"}):
            return None
        splats = shape.splats()
        if splats is None:
            if not self._wants(_MESHES):
                raise ValueError(
                    "exporter.formats: the object is not made of Gaussians, so there are no splats to write; "
                    "choose another format, e.g. glb"
                )
            notes.add("no splats were written, because the object is not made of Gaussians")
        return splats

    def _make(self, shape: Shape, notes: _Notes, clock: _Stages) -> _Made:
        """Surface, simplified mesh and textures."""
        config = self.config
        with clock.stage("surface") as step:
            found = self._find(shape, step)
            notes.add(*findings(found, shape.radius))
            problem = "" if found.mesh.uvs is None else unusable_uvs(found.mesh)
            least = self._least_volume(found.mesh, usable=found.mesh.uvs is not None and not problem)
            surface, dropped = self._clean(found.mesh, least, notes)
        with clock.stage("simplify"):
            mesh = self._with_own_uvs(found.mesh, self._simplify(surface, least, notes), problem, notes)
            closed = topology(mesh)
            notes.add(*not_closed(closed))
        textures = colors = None
        if self._wants(_TEXTURED):
            if mesh.uvs is None:
                with clock.stage("unwrap"):
                    size, padding = config.texture_size, config.padding
                    mesh, note = unwrap(mesh, size, padding=padding, timeout=config.unwrap_timeout)
                    notes.add(*([note] if note else []))
            with clock.stage("texture") as step:
                textures = self._bake(shape, mesh, surface, step)
        if self._wants({"ply"}):
            colors = quantize(query_color(shape, surface.vertices, chunk=config.chunk))
        frame = Frame(config.up_axis, metres(mesh, config.scale, config.height))
        report = mesh_report(found, mesh, closed, dropped, frame.scale, textures)
        unlit = self._wants({"glb"}) and self._unlit(shape, notes)
        return _Made(surface, mesh, frame, textures, colors, unlit, report)

    def _find(self, shape: Shape, progress: Callable[[float], None]) -> FoundSurface:
        config = self.config
        return find_surface(
            shape,
            config.resolution,
            threshold=None if config.threshold == "auto" else config.threshold,
            fill_cavities=config.fill_cavities,
            refine_steps=config.refine_steps,
            chunk=config.chunk,
            progress=progress,
        )

    def _least_volume(self, mesh: Mesh, *, usable: bool) -> float | None:
        """The least volume of a piece, as a fraction of the largest; None keeps all pieces.

        Args:
            mesh: As it was found.
            usable: It has usable texture coordinates.
        """
        if self.config.largest_component:
            return 1.0
        if self.config.min_component_volume is not None:
            return self.config.min_component_volume
        return None if mesh.authored or usable else DEFAULT_LEAST_VOLUME

    def _clean(self, surface: Mesh, least: float | None, notes: _Notes) -> tuple[Mesh, int]:
        """The surface without holes, floaters and noise, and the number of floaters dropped.

        ``faces`` stays the same array where no face was added or dropped.
        """
        authored, dropped = surface.authored, 0
        surface = replace(surface, uvs=None, uv_faces=None)
        if self.config.fill_holes:
            surface, count = fill_holes(surface)
            notes.add(*([f"{count} holes of the surface were closed"] if count else []))
        if least is not None:
            surface, dropped = drop_small_components(surface, least)
        if self.config.smoothing:
            surface = smooth(surface, self.config.smoothing)
        return replace(surface, authored=authored), dropped

    def _simplify(self, surface: Mesh, least: float | None, notes: _Notes) -> Mesh:
        """The surface within the face budget, if there is one; the same object where it is already."""
        budget = self.config.max_faces
        if budget is None:
            budget = len(surface.faces) if surface.authored else DEFAULT_FACES
        if len(surface.faces) <= budget:
            return surface
        mesh = decimate(surface, budget)
        if least is not None:
            # Parting pinched walls can leave crumbs.
            mesh, _ = drop_small_components(mesh, least)
        if surface.authored:
            sizes = f"{len(surface.faces):,} to {len(mesh.faces):,} faces"
            notes.add(f"your mesh was simplified from {sizes}, because exporter.max_faces is {budget:,}")
        return mesh

    def _with_own_uvs(self, own: Mesh, mesh: Mesh, problem: str, notes: _Notes) -> Mesh:
        """The mesh with the texture coordinates it was found with, where they still fit it; notes why not.

        Args:
            own: As it was found.
            mesh: After clean-up and simplification.
            problem: Why the coordinates of ``own`` are unusable, or an empty string.
            notes: For the report.
        """
        if own.uvs is None:
            return mesh
        if mesh.faces is not own.faces:
            problem = f"the faces changed ({len(own.faces):,} before, {len(mesh.faces):,} now)"
        if problem:
            notes.add(f"the mesh's texture coordinates were replaced by new ones: {problem}")
            return mesh
        return replace(mesh, uvs=own.uvs, uv_faces=own.uv_faces)

    def _unlit(self, shape: Shape, notes: _Notes) -> bool:
        """Whether the GLB is marked as unlit."""
        if self.config.unlit == "auto":
            return shape.baked_lighting
        if self.config.unlit and not shape.baked_lighting:
            notes.add(
                "exporter.unlit is true, but the colours of this material include no light: viewers will show a flat "
                "silhouette; set exporter.unlit=auto"
            )
        return self.config.unlit

    def _bake(self, shape: Shape, mesh: Mesh, surface: Mesh, progress: Callable[[float], None]) -> Textures:
        config = self.config
        return bake_textures(
            shape,
            mesh,
            config.texture_size,
            detail=surface if config.normal_map == "surface" else None,
            normals=config.normal_map != "none",
            occlusion=config.occlusion,
            chunk=config.chunk,
            progress=progress,
        )

    def _write(self, folder: Path, paths: list[Path], name: str, made: _Made) -> None:
        """Every mesh format into ``folder``; appends the files to ``paths``, each after those it refers to."""
        mesh, frame, sides = made.mesh, made.frame, made.report.holes > 0
        if made.textures is not None:
            if self._wants({"obj"}):
                paths += write_obj(folder, name, mesh, made.textures, frame)
            if self._wants({"glb"}):
                paths.append(folder / f"{name}.glb")
                options = {"unlit": made.unlit, "double_sided": sides}
                write_glb(paths[-1], mesh, made.textures, name, scale=frame.scale, **options)
            if self._wants({"usdz"}):
                paths.append(folder / f"{name}.usdz")
                write_usdz(paths[-1], mesh, made.textures, name, double_sided=sides, scale=frame.scale)
        if self._wants({"ply"}):
            paths.append(folder / f"{name}.ply")
            write_ply(paths[-1], replace(made.surface, vertex_colors=made.colors), frame)
        if self._wants({"stl"}):
            paths.append(folder / f"{name}.stl")
            write_stl(paths[-1], made.surface, frame)


@dataclass(frozen=True)
class _Made:
    """What is written: the surface before simplification, and the unwrapped mesh with its textures."""

    surface: Mesh
    mesh: Mesh
    frame: Frame
    textures: Textures | None
    colors: np.ndarray | None
    unlit: bool
    report: ExportReport


class _Notes(list[str]):
    """Sentences for the report, logged as they come."""

    def add(self, *notes: str) -> None:
        for note in notes:
            logger.warning(note)
            self.append(note)


def _splat_report(splats: Splats | None) -> ExportReport:
    """The report of an export without a mesh; sizes and times are filled in later."""
    assert splats is not None
    low, high = (bound.values.tolist() for bound in (splats.means.min(dim=0), splats.means.max(dim=0)))
    return ExportReport(0, 0, False, 0, 0, 0, 0, None, None, (tuple(low), tuple(high)), {}, {}, ())


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
