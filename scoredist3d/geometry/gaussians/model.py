"""3D Gaussians with adaptive density control (Kerbl et al. 2023, arXiv 2308.04079)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scoredist3d.config import FieldError, option
from scoredist3d.geometry.base import GaussianCloud, GaussianSet, GeometryInit, PointFunction, distance_density
from scoredist3d.geometry.gaussians.density_control import AdaptiveDensityControl, DensifyConfig
from scoredist3d.geometry.gaussians.field import GaussianField
from scoredist3d.geometry.gaussians.initialization import (
    ColorFunction,
    gaussians_from_points,
    gaussians_in_ball,
    gaussians_on_surface,
)
from scoredist3d.geometry.gaussians.parameters import GaussianParameters
from scoredist3d.limits import MAX_POINTS
from scoredist3d.materials.base import Material
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.loading import load_mesh
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@dataclass
class SurfaceInitConfig:
    """Initialization of Gaussians on the surface of a mesh file or of an earlier stage's object."""

    opacity: float = option(0.8, "Initial opacity of Gaussians on an earlier stage's object.", gt=0, lt=1)
    thickness: float = option(
        0.1,
        "Ratio of the standard deviation along the normal to that along the surface; 1 gives isotropic Gaussians.",
        gt=0,
        le=1,
    )
    around: float = option(
        0.0, "Number of additional Gaussians near the surface, as a fraction of num_points (GaussianDreamer).", ge=0
    )
    distance: float = option(
        0.02,
        "Standard deviation of the additional Gaussians' displacement from the surface, as a fraction of the radius.",
        ge=0,
    )


@register(
    "geometry",
    "gaussians",
    summary="3D Gaussians with adaptive density control, for Gaussian splatting.",
    arxiv="2308.04079",
)
class Gaussians(GaussianParameters):
    """N Gaussians with means, standard deviations, quaternions, opacities and features.

    :class:`~scoredist3d.geometry.gaussians.density_control.AdaptiveDensityControl` changes their number during
    training. :class:`~scoredist3d.geometry.gaussians.field.GaussianField` gives them a surface for export and
    conversion.
    """

    # These options affect only the initial Gaussians, which are part of the state, and their later number.
    free_options = frozenset(
        {
            "num_points",
            "init",
            "init_file",
            "init_up",
            "init_fit",
            "init_radius",
            "init_opacity",
            "surface",
            "densify",
            "export_resolution",
            "export_thickness",
        }
    )
    iso_level = 1.0

    @dataclass
    class Config(GaussianCloud.Config):
        """Options of the Gaussians."""

        num_points: int = option(4096, "Initial number of Gaussians.", ge=4, le=MAX_POINTS)
        init: Literal["sphere", "mesh", "points"] = option(
            "sphere",
            "Initial Gaussians: gray in a ball, on the surface of a mesh file, or at the points of a PLY file.",
        )
        init_file: str | None = option(
            None,
            "File for init=mesh (GLB, OBJ, PLY or STL), or for init=points (PLY file of points or Gaussians).",
            file=True,
        )
        init_up: Literal["auto", "y", "z"] = option(
            "auto", "Upward axis of init_file; auto uses the convention of the file format."
        )
        init_fit: bool = option(True, "Center the object of init_file and scale it to extend to 0.9 of the radius.")
        init_radius: float = option(
            0.5, "Radius of the initial ball for init=sphere, as a fraction of geometry.radius.", gt=0, le=1
        )
        init_opacity: float = option(0.1, "Initial opacity of each Gaussian.", gt=0, lt=1)
        surface: SurfaceInitConfig = field(
            default_factory=SurfaceInitConfig, metadata={"help": "Initialization on a surface."}
        )
        densify: DensifyConfig = field(default_factory=DensifyConfig, metadata={"help": "Adaptive density control."})
        export_resolution: int = option(
            128,
            "Points along each side of the grid on which the depths of 64 views are fused to a surface for export and "
            "conversion; use the same value as for exporter.resolution.",
            ge=8,
            le=512,
        )
        export_thickness: float = option(
            0.01,
            "Standard deviation of the blur of the Gaussians that give the surface its colors, as a fraction of the "
            "radius.",
            gt=0,
        )

        @property
        def num_around(self) -> int:
            """Number of additional Gaussians near the initial surface."""
            return round(self.surface.around * self.num_points)

        def validate(self) -> list[str]:
            """Require a file where ``init`` needs one, and at most ``densify.max_points`` initial Gaussians."""
            problems = super().validate()
            if self.init != "sphere" and self.init_file is None:
                problems.append(f"init_file: init={self.init} needs a file; set init_file")
            if self.init == "sphere" and self.init_file is not None:
                problems.append(
                    "init_file: init=sphere uses no file; set init=mesh or init=points, or remove init_file"
                )
            most = self.densify.max_points
            if self.densify.enabled and self.num_points > most:
                problems.append(
                    f"num_points: {self.num_points} exceeds densify.max_points = {most}; lower num_points or raise "
                    "densify.max_points"
                )
            elif self.densify.enabled and self.num_points + self.num_around > most:
                problems.append(
                    f"surface.around: {self.num_around} Gaussians around the surface and num_points = "
                    f"{self.num_points} on it exceed densify.max_points = {most}; lower one of them or raise "
                    "densify.max_points"
                )
            return problems

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config, num_features=3 if material is None else material.num_features)
        self.config = config
        generator = (rng or Rng()).shared()("geometry")
        with torch.no_grad():
            self.assign(self._initial(material, generator))
        self.densification = AdaptiveDensityControl(self, config.densify)
        self._cached_field: tuple[GaussianSet, GaussianField] | None = None

    def density(self, points: Tensor) -> Tensor:
        """(N,) densities at (N, 3) points from the distance to the surface; see :class:`GaussianField`."""
        return distance_density(self._as_field().distance(points), points, self.radius)

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) mean features of the Gaussians at (N, 3) points, weighted by their extinction."""
        return self._as_field().features_at(points)

    @torch.no_grad()
    def init_from(self, source: GeometryInit, rng: Rng) -> str:
        """Place flat Gaussians with the source's features on its surface; returns a description of the result."""
        features = source.features or (lambda points: self.features.new_zeros(len(points), self.num_features))
        generator = rng.shared()("geometry/start", 0, self.device)
        self.assign(self._on_surface(source.mesh, self.config.surface.opacity, features, generator))
        width = float(self.log_scales.exp().median())
        return f"{len(self):,} Gaussians on its surface with a median standard deviation of {width:.3g}"

    def _as_field(self) -> GaussianField:
        """The field of the current Gaussians; cached until they change."""
        with torch.no_grad():
            now = self()
        if self._cached_field is not None:
            last, cached = self._cached_field
            if all(torch.equal(getattr(now, f.name), getattr(last, f.name)) for f in fields(GaussianSet)):
                return cached
        copied = GaussianSet(**{f.name: getattr(now, f.name).detach().clone() for f in fields(GaussianSet)})
        config = self.config
        made = GaussianField(copied, self.radius, config.export_thickness * self.radius, config.export_resolution)
        self._cached_field = (copied, made)
        return made

    def _initial(self, material: Material | None, generator: torch.Generator) -> GaussianSet:
        """The initial Gaussians selected by the option ``init``."""
        config = self.config

        def color_features(colors: Tensor) -> Tensor:
            return torch.zeros_like(colors) if material is None else material.features_of(SurfaceChannels(colors))

        if config.init_file is None:
            extent = config.init_radius * self.radius
            return gaussians_in_ball(
                config.num_points, extent, config.init_opacity, color_features, generator, self.radius
            )
        if config.init == "points":
            return self._from_points(config.init_file, color_features, generator)
        loaded = load_mesh(config.init_file, config.init_up)
        loaded = loaded.fitted(self.radius) if config.init_fit else loaded

        def features(points: Tensor) -> Tensor:
            if not loaded.has_colors or material is None:
                return color_features(torch.full_like(points, 0.5))
            return material.features_of(loaded.appearance(points))

        return self._on_surface(loaded.mesh, config.init_opacity, features, generator)

    def _on_surface(
        self, mesh: Mesh, opacity: float, features: PointFunction, generator: torch.Generator
    ) -> GaussianSet:
        """Gaussians on a mesh and, if ``surface.around`` is positive, near it."""
        config = self.config
        return gaussians_on_surface(
            mesh,
            config.num_points,
            opacity,
            config.surface.thickness,
            features,
            generator,
            self.radius,
            around=config.num_around,
            distance=config.surface.distance * self.radius,
        )

    def _from_points(self, path: str, color_features: ColorFunction, generator: torch.Generator) -> GaussianSet:
        """Gaussians from the points or Gaussians of a PLY file.

        Raises:
            ValueError: The file has more Gaussians than ``densify.max_points``.
        """
        config = self.config
        made = gaussians_from_points(
            path,
            config.init_up,
            config.num_points,
            config.init_opacity,
            config.init_fit,
            color_features,
            generator,
            self.radius,
        )
        if config.densify.enabled and len(made.means) > config.densify.max_points:
            raise FieldError(
                f"{Path(path).name} has {len(made.means)} Gaussians, more than "
                f"densify.max_points = {config.densify.max_points}; raise it, or set densify.enabled=false",
                "init_file",
            )
        return made
