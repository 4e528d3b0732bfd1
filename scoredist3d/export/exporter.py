"""The default exporter: textured meshes, plain surfaces and splats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from scoredist3d.config import FieldError, option
from scoredist3d.export.bake import Textures, bake_textures, quantize
from scoredist3d.export.base import Exporter, ExportResult
from scoredist3d.export.check import CHECK_SUFFIX, best_mesh, check_mesh
from scoredist3d.export.cleaning import clean_surface, simplify_surface
from scoredist3d.export.diagnostics import (
    check_problems,
    crease_problems,
    field_problems,
    mesh_report,
    splat_report,
    surface_problems,
)
from scoredist3d.export.files import safe_name, staged_files
from scoredist3d.export.formats.base import FileFormat, format_names, lookup_format
from scoredist3d.export.frame import Frame, Pivot, fit_frame
from scoredist3d.export.images import save_png
from scoredist3d.export.products import ColoredSurfaceProduct, Product, SplatProduct, SurfaceProduct, TexturedProduct
from scoredist3d.export.real_heights import real_height
from scoredist3d.export.report import ExportReport, MeshReport
from scoredist3d.export.stages import Notes, StageProgress, Stages
from scoredist3d.export.unseen import SeenSurface, seen_surface
from scoredist3d.export.unseen_shape import flatten_unseen
from scoredist3d.limits import MAX_SAMPLES
from scoredist3d.meshes.exportable import Exportable, HasTrainingCameras, query_color
from scoredist3d.meshes.isosurface_extraction import FoundSurface, find_surface
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.uv import unusable_uvs, unwrap, with_own_uvs
from scoredist3d.registry import register

DEFAULT_FACES = 10000
DEFAULT_LEAST_VOLUME = 0.02
_VIEWS = 80  # training cameras from which the visible part of the surface is determined


@register(
    "exporter",
    "textured-mesh",
    summary="Textured mesh with textures baked from the material; also plain surfaces and Gaussian splats.",
)
class TexturedMeshExporter(Exporter):
    """Exporter of textured meshes, plain surfaces and 3D Gaussians in any of the registered file formats.

    The steps are: density grid, marching cubes, clean-up, decimation, UV unwrapping, texture baking, files. An object
    that is already a surface skips the first two. A mesh supplied by the user keeps all its faces unless an option
    lowers their number, and usable texture coordinates are kept as long as the faces are unchanged. By default all
    files are y up with the object's front towards +z.
    """

    @dataclass
    class Config(Exporter.Config):
        """Formats, quality and size of an export."""

        formats: list[str] = option(
            ["glb", "obj"],
            "Files to write. glb, obj and usdz contain the textured mesh; ply and stl contain the surface before "
            "simplification, with vertex colors in ply; splats is a PLY file of Gaussians, for objects made of them. "
            "usdz needs the package usd-core.",
            choices=format_names,
        )
        resolution: int = option(
            128, "Density samples along each side of the cube around the object's ball.", ge=8, le=1024
        )
        threshold: Literal["auto"] | float = option(
            "auto",
            "Density of the surface. auto: the surface of a radiance field is fused from renders of its depth; that of "
            "signed distances and Gaussians is known.",
            gt=0,
        )
        max_faces: int | None = option(
            None,
            "Maximum number of faces; UV unwrapping time grows faster than linearly with it. Default: "
            f"{DEFAULT_FACES}, or no limit for a mesh of your own.",
            ge=16,
            le=200000,
        )
        texture_size: int = option(1024, "Side length of the square textures, in texels.", ge=32, le=8192)
        min_component_volume: float | None = option(
            None,
            "Components with a volume below this fraction of the largest one are dropped, except long thin parts near "
            f"the rest; 1 keeps only the largest. Default: {DEFAULT_LEAST_VOLUME}; a mesh of your own, or one with "
            "texture coordinates, keeps all components.",
            ge=0,
            le=1,
        )
        largest_component: bool = option(False, "Keep only the largest component; the same as min_component_volume=1.")
        fill_cavities: bool = option(True, "Fill empty space enclosed by the object.")
        fill_holes: bool = option(False, "Close the holes of an open surface before simplification.")
        max_tunnel_girth: float = option(
            0.15,
            "Tunnels through a closed surface, such as pinholes in a wall, are filled if their girth, the length of "
            "the shortest loop around them, is at most this fraction of the radius of the object's ball; 0 keeps them. "
            "A mesh of your own, or one with texture coordinates, keeps all tunnels.",
            ge=0,
            le=1,
        )
        refine_steps: int = option(
            4, "Bisection steps that refine each vertex along its grid edge with new density samples.", ge=0, le=16
        )
        smoothing: int = option(0, "Taubin smoothing steps before simplification, for noisy surfaces.", ge=0, le=200)
        normal_map: Literal["auto", "surface", "none"] = option(
            "auto",
            "Normals to bake. auto: the material's shading normals, if it has any; surface: the normals of the surface "
            "before simplification, modified by the material's shading normals; none: no normal map.",
        )
        occlusion: bool = option(False, "Bake ambient occlusion of the simplified surface.")
        fill_unseen: Literal["auto"] | bool = option(
            "auto",
            "Replace the colors of parts that no training camera sees, such as undersides, by colors diffused from the "
            "parts around them. auto does so except for a mesh of your own, which may have its own colors there.",
        )
        flatten_unseen: Literal["auto"] | bool = option(
            "auto",
            "Flatten the parts of a closed surface that no training camera sees, such as undersides. auto does so, "
            "except for a mesh of your own.",
        )
        unlit: Literal["auto"] | bool = option(
            "auto",
            "Mark the GLB as unlit: viewers then show the colors without lighting them. auto does so for materials "
            "whose colors include the lighting (unlit, neural-radiance, spherical-harmonics, latent).",
        )
        scale: float = option(1.0, "Meters per scene unit.", gt=0)
        height: Literal["real-world"] | float | None = option(
            None,
            "Height of the object in meters; overrides scale. real-world: the usual height of the kind of object that "
            "the prompt names.",
            gt=0,
        )
        pivot: Pivot = option(
            "scene",
            "Origin of the files. scene: the origin of the scene; center: the center of the object's bounding box; "
            "base: the center of the underside of that box, so that the object stands on the ground.",
        )
        up_axis: Literal["y", "z"] = option(
            "y",
            "Up axis of obj, ply and stl files; z keeps the world's axes. glb, usdz and splats are always y up.",
        )
        check: bool = option(
            True,
            "Compare the mesh with the object: the picture NAME-check.png shows both from 6 sides, and the report has "
            "figures and warnings.",
        )
        padding: int = option(4, "Padding between UV charts, in texels.", ge=0, le=64)
        unwrap_timeout: float = option(
            60.0, "Time limit of xatlas in seconds; if it is exceeded, each face gets its own chart.", ge=0
        )
        chunk: int = option(131072, "Number of points per query of the object.", ge=1, le=MAX_SAMPLES)

        def validate(self) -> list[str]:
            """Error messages for invalid options: at least one format is required."""
            return [] if self.formats else [f"formats: must name at least one of {', '.join(format_names())}"]

    def __init__(self, config: Config) -> None:
        self.config = config
        self.formats = [lookup_format(name) for name in dict.fromkeys(config.formats)]

    def export(self, shape: Exportable, folder: Path, name: str, progress: StageProgress | None = None) -> ExportResult:
        """Write one file per format; see :meth:`Exporter.export`.

        Raises:
            ValueError: The object is empty or has invalid values, or a format is unavailable or not applicable.
        """
        if self.config.height == "real-world":
            return self.for_prompt(name).export(shape, folder, name, progress)
        stages, notes, name = Stages(progress), Notes(), safe_name(name)
        for file_format in self.formats:
            if problem := file_format.problem():
                raise ValueError(problem)
        splats = shape.splats() if any(each.needs is SplatProduct for each in self.formats) else None
        formats = self._applicable(splats is not None, notes)
        products: dict[type, Product] = {}
        mesh = check = picture = gaussians = None
        if any(each.needs is not SplatProduct for each in formats):
            products, mesh = self._mesh_products(shape, formats, notes, stages)
            if self.config.check:
                with stages.stage("check"):
                    picture, check = check_mesh(shape, best_mesh(products))
                notes.add(*check_problems(check, mesh))
        if splats is not None:
            # The Gaussians and their mesh have the same unit and origin.
            frame = products[SurfaceProduct].frame if products else self._frame(splats.extent)
            products = products | {SplatProduct: SplatProduct(splats, frame)}
            gaussians = splat_report(splats, frame)
        with stages.stage("write"), staged_files(Path(folder)) as (staging, paths):
            for file_format in formats:
                path = staging / f"{name}{file_format.suffix}"
                paths += file_format.write(path, products[file_format.needs])
            if picture is not None:
                paths.append(save_png(picture, staging / f"{name}{CHECK_SUFFIX}"))
        sizes = {path.name: path.stat().st_size for path in paths}
        return ExportResult(paths, ExportReport(sizes, stages.seconds, tuple(notes), mesh, gaussians, check))

    def for_prompt(self, prompt: str) -> TexturedMeshExporter:
        """The exporter whose ``height`` is a number, for an object with this prompt; see :meth:`Exporter.for_prompt`.

        Raises:
            FieldError: ``height`` is ``real-world``, and the prompt names no kind of object with a known height, or
                several.
        """
        if self.config.height != "real-world":
            return self
        try:
            return type(self)(replace(self.config, height=real_height(prompt)))
        except ValueError as error:
            raise FieldError(str(error), "height") from error

    def _frame(self, bounds: tuple[np.ndarray, np.ndarray]) -> Frame:
        """Axes, unit and origin of the files of an object with these lowest and highest corners."""
        config = self.config
        assert not isinstance(config.height, str), "for_prompt makes it a number"
        return fit_frame(bounds, up=config.up_axis, scale=config.scale, height=config.height, pivot=config.pivot)

    def _applicable(self, has_splats: bool, notes: Notes) -> list[FileFormat]:
        """The formats that apply to the object; Gaussian formats are left out, with a warning, if it has no Gaussians.

        Raises:
            ValueError: No format is left.
        """
        if has_splats:
            return self.formats
        formats = [each for each in self.formats if each.needs is not SplatProduct]
        if not formats:
            raise ValueError(
                "exporter.formats: the object is not made of Gaussians, so there are no splats to write; "
                "choose another format, e.g. glb"
            )
        if len(formats) < len(self.formats):
            notes.add("no splats were written, because the object is not made of Gaussians")
        return formats

    def _mesh_products(
        self, shape: Exportable, formats: list[FileFormat], notes: Notes, stages: Stages
    ) -> tuple[dict[type, Product], MeshReport]:
        """The mesh products that ``formats`` need, by class, and the mesh report."""
        config, needs = self.config, {each.needs for each in formats}
        with stages.stage("surface") as step:
            found = self._find(shape, step)
            notes.add(*field_problems(found, shape.radius))
            problem = "" if found.mesh.uvs is None else unusable_uvs(found.mesh)
            keeps_all = found.mesh.authored or (found.mesh.uvs is not None and not problem)
            least = self._least_volume(keeps_all=keeps_all)
            cleaned = clean_surface(
                found.mesh,
                close_holes=config.fill_holes,
                least_volume=least,
                longest_tunnel=0.0 if keeps_all else config.max_tunnel_girth * shape.radius,
                smoothing=config.smoothing,
                notes=notes,
            )
            surface = self._flattened(shape, cleaned.mesh)
        with stages.stage("simplify"):
            budget = config.max_faces or (len(surface.faces) if surface.authored else DEFAULT_FACES)
            mesh, lost = with_own_uvs(found.mesh, simplify_surface(surface, budget, least, notes), problem)
            notes.add(*([lost] if lost else []))
            closed = topology(mesh)
            notes.add(*surface_problems(closed))
        textures = None
        if TexturedProduct in needs:
            mesh, textures = self._textured(shape, mesh, surface, notes, stages)
        colors = None
        if ColoredSurfaceProduct in needs:
            colors = quantize(self._vertex_colors(shape, surface))
        frame = self._frame(mesh.bounds)
        report = mesh_report(found, mesh, closed, cleaned, frame, textures)
        if config.check and not surface.authored:
            notes.add(*crease_problems(report))
        unlit = any(each.has_unlit for each in formats) and self._unlit(shape, notes)
        products: dict[type, Product] = {SurfaceProduct: SurfaceProduct(surface, frame)}
        if textures is not None:
            products[TexturedProduct] = TexturedProduct(mesh, textures, frame, report.holes > 0, unlit)
        if colors is not None:
            products[ColoredSurfaceProduct] = ColoredSurfaceProduct(replace(surface, vertex_colors=colors), frame)
        return products, report

    def _textured(
        self, shape: Exportable, mesh: Mesh, surface: Mesh, notes: Notes, stages: Stages
    ) -> tuple[Mesh, Textures]:
        """The mesh with texture coordinates, and its textures.

        Args:
            shape: The object.
            mesh: The simplified mesh; unwrapped here unless it has texture coordinates.
            surface: The surface before simplification.
            notes: Receives warnings.
            stages: Timer of the export.
        """
        config = self.config
        if mesh.uvs is None:
            with stages.stage("unwrap"):
                size, padding = config.texture_size, config.padding
                mesh, note = unwrap(mesh, size, padding=padding, timeout=config.unwrap_timeout)
                notes.add(*([note] if note else []))
        with stages.stage("texture") as progress:
            textures = bake_textures(
                shape,
                mesh,
                config.texture_size,
                detail=surface if config.normal_map == "surface" else None,
                normals=config.normal_map != "none",
                occlusion=config.occlusion,
                seen=self._seen(shape, mesh, authored=surface.authored),
                chunk=config.chunk,
                progress=progress,
            )
        return mesh, textures

    def _flattened(self, shape: Exportable, surface: Mesh) -> Mesh:
        """The surface with flat parts where no training camera sees it; the same object if nothing changes."""
        option = self.config.flatten_unseen
        wanted = not surface.authored if option == "auto" else option
        cameras = shape.training_cameras(_VIEWS) if wanted and isinstance(shape, HasTrainingCameras) else None
        if cameras is None or topology(surface).boundary_edges:
            return surface
        return flatten_unseen(surface, cameras)

    def _seen(self, shape: Exportable, mesh: Mesh, *, authored: bool) -> SeenSurface | None:
        """What the training cameras see of a mesh; None if the object's colors are kept everywhere."""
        wanted = not authored if self.config.fill_unseen == "auto" else self.config.fill_unseen
        cameras = shape.training_cameras(_VIEWS) if wanted and isinstance(shape, HasTrainingCameras) else None
        return None if cameras is None else seen_surface(mesh, cameras, both_sides=topology(mesh).boundary_edges > 0)

    def _vertex_colors(self, shape: Exportable, surface: Mesh) -> np.ndarray:
        """Colors (V, 3) in [0, 1] of the vertices of a surface, with the unseen ones filled."""
        colors = query_color(shape, surface.vertices, surface.vertex_normals(), chunk=self.config.chunk)
        seen = self._seen(shape, surface, authored=surface.authored)
        return colors if seen is None else seen.at_vertices(surface).fill(colors)

    def _find(self, shape: Exportable, progress: Callable[[float], None]) -> FoundSurface:
        """The object's surface, extracted from its density unless the object itself is a surface."""
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

    def _least_volume(self, *, keeps_all: bool) -> float | None:
        """Volume below which components are dropped, as a fraction of the largest volume; None keeps all components.

        ``keeps_all`` says whether all of them are kept by default.
        """
        if self.config.largest_component:
            return 1.0
        if self.config.min_component_volume is not None:
            return self.config.min_component_volume
        return None if keeps_all else DEFAULT_LEAST_VOLUME

    def _unlit(self, shape: Exportable, notes: Notes) -> bool:
        """Whether the mesh is marked as unlit."""
        if self.config.unlit == "auto":
            return shape.baked_lighting
        if self.config.unlit and not shape.baked_lighting:
            notes.add(
                "exporter.unlit is true, but the colors of this material do not include lighting, so viewers will show "
                "a flat silhouette; set exporter.unlit=auto"
            )
        return self.config.unlit
