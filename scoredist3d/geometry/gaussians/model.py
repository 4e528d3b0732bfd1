"""3D Gaussians that come and go while training (Kerbl et al. 2023, arXiv 2308.04079)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from scoredist3d.config import FieldError, option
from scoredist3d.geometry.base import GaussianCloud, GaussianSet, GeometryInit
from scoredist3d.geometry.gaussians.density_control import (
    DensifyConfig,
    choose_growth,
    clear_moments,
    is_spent,
    replace_values,
    resize_rows,
    split_means,
)
from scoredist3d.geometry.gaussians.field import GaussianField
from scoredist3d.geometry.gaussians.initialization import (
    Look,
    gaussians_from_points,
    gaussians_in_ball,
    gaussians_on_surface,
)
from scoredist3d.materials.base import Material
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.loading import load_mesh
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.splats import Splats
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

if TYPE_CHECKING:
    from scoredist3d.ops.splatting.splat import Projected

_LEAST_OPACITY = 1e-6  # keeps logits finite


@dataclass
class SurfaceStartConfig:
    """Gaussians on a surface: of a mesh file, or of an earlier stage's object."""

    opacity: float = option(0.8, "Opacity of Gaussians that start from another object.", gt=0, lt=1)
    thickness: float = option(
        0.1, "Deviation along the normal, in units of that along the surface; 1 is round.", gt=0, le=1
    )
    around: float = option(
        0.0, "Further Gaussians near the surface, as a fraction of num_points (GaussianDreamer).", ge=0
    )
    distance: float = option(0.02, "How far from the surface those are, as a fraction of the radius.", ge=0)


@register(
    "geometry",
    "gaussians",
    summary="3D Gaussians with adaptive density control, for Gaussian splatting.",
    arxiv="2308.04079",
)
class Gaussians(GaussianCloud):
    """N Gaussians: means, log deviations, quaternions, logits of the opacities, and features for the material.

    Every ``densify.every`` steps Gaussians grow whose place in the image the loss pulls at: with L the step's loss, B
    the cameras of a render, and p a mean's place in normalised device coordinates (each axis from -1 to 1 across the
    image, so that the image's size does not matter), the statistic is the mean of |B dL/dp| over the views in which
    the Gaussian was visible; B makes up for the mean over views in L. Small ones are cloned, large ones split in two;
    those too transparent or too large go. All of it is a function of the state and of ``rng``, and the statistics are
    part of the state, so that a resumed run is the uninterrupted one.

    After each step means that have left the ball are put back on it.
    """

    # They are in the state, how many and where.
    free_options = frozenset(
        {"num_points", "init", "init_file", "init_up", "init_fit", "init_radius", "init_opacity", "surface", "densify"}
    )

    @dataclass
    class Config(GaussianCloud.Config):
        """Options of the Gaussians."""

        num_points: int = option(4096, "Gaussians at the start.", ge=4)
        init: Literal["sphere", "mesh", "points"] = option(
            "sphere", "Where they start: gray in a ball, on a mesh file's surface, or at the points of a PLY file."
        )
        init_file: str | None = option(
            None, "Mesh file (GLB, OBJ, PLY, STL) or PLY file of points or Gaussians, for init.", file=True
        )
        init_up: Literal["auto", "y", "z"] = option("auto", "Upward axis of that file; auto tells it by its kind.")
        init_fit: bool = option(True, "Centre the file's object and scale it to 0.9 of the radius.")
        init_radius: float = option(0.5, "Radius of the starting ball, as a fraction of the radius.", gt=0, le=1)
        init_opacity: float = option(0.1, "Opacity of each Gaussian at the start.", gt=0, lt=1)
        surface: SurfaceStartConfig = field(
            default_factory=SurfaceStartConfig, metadata={"help": "How Gaussians are put on a surface."}
        )
        densify: DensifyConfig = field(
            default_factory=DensifyConfig, metadata={"help": "When Gaussians are added and removed."}
        )
        export_thickness: float = option(
            0.01,
            "Gaussians thinner than this count as so thick when their surface is looked for; fraction of the radius.",
            gt=0,
        )

        @property
        def num_around(self) -> int:
            """Gaussians near a surface to start from, besides those on it."""
            return round(self.surface.around * self.num_points)

        def validate(self) -> list[str]:
            """A file where one is needed; room for the start."""
            problems = super().validate()
            if (self.init == "sphere") != (self.init_file is None):
                wanted = "drop it, or say what it is with init=mesh or init=points" if self.init_file else "name a file"
                problems.append(f"init_file: init={self.init} starts {_STARTS[self.init]}; {wanted}")
            most = self.densify.max_points
            if self.densify.enabled and self.num_points > most:
                problems.append(f"num_points: {self.num_points} exceeds densify.max_points, which is {most}")
            elif self.densify.enabled and self.num_points + self.num_around > most:
                problems.append(
                    f"surface.around: {self.num_around} Gaussians around the surface and num_points = "
                    f"{self.num_points} on it exceed densify.max_points, which is {most}"
                )
            return problems

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = 3 if material is None else material.num_features
        self.grows = config.densify.enabled
        generator = (rng or Rng()).shared()("geometry")
        with torch.no_grad():
            start = self._initial(material, generator)
        self.means = nn.Parameter(torch.empty(0, 3))
        self.log_scales = nn.Parameter(torch.empty(0, 3))
        self.quaternions = nn.Parameter(torch.empty(0, 4))
        self.opacity_logits = nn.Parameter(torch.empty(0))
        self.features = nn.Parameter(torch.empty(0, self.num_features))
        self.register_buffer("gradient_sum", torch.empty(0))
        self.register_buffer("views_seen", torch.empty(0))
        self._assign(start)
        self._observed: list[tuple[Tensor, Tensor]] = []
        self._field: tuple[GaussianSet, GaussianField] | None = None

    gradient_sum: Tensor
    views_seen: Tensor

    def __len__(self) -> int:
        """N."""
        return len(self.means)

    def forward(self) -> GaussianSet:
        """The Gaussians, differentiable in the parameters."""
        return GaussianSet(
            self.means, self.log_scales.exp(), self.quaternions, self.opacity_logits.sigmoid(), self.features
        )

    def density(self, points: Tensor) -> Tensor:
        """(N,) extinction of the Gaussians near (N, 3) points; see :class:`GaussianField`."""
        return self._as_field().density(points)

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F): the mean of the Gaussians near (N, 3) points, weighted with their extinction there."""
        return self._as_field().features_at(points)

    @torch.no_grad()
    def splats(
        self, colors: Callable[[Tensor], Tensor], harmonics: Callable[[Tensor], Tensor | None] = lambda _: None
    ) -> Splats:
        """The Gaussians as a file holds them."""
        gaussians = self()
        return Splats(
            gaussians.means.clone(),
            gaussians.scales,
            nn.functional.normalize(gaussians.quaternions, dim=-1),
            gaussians.opacities,
            colors(gaussians.features),
            harmonics(gaussians.features),
        )

    @torch.no_grad()
    def init_from(self, start: GeometryInit, rng: Rng) -> str:
        """Flat Gaussians on the other object's surface, with its look."""
        look = start.features or (lambda points: self.features.new_zeros(len(points), self.num_features))
        generator = rng.shared()("geometry/start", 0, self.device)
        self._assign(self._on_surface(start.mesh, self.config.surface.opacity, look, generator))
        return f"{len(self):,} Gaussians on its surface, {float(self.log_scales.exp().median()):.3g} wide"

    def prepare_loading(self, state: Mapping[str, Tensor]) -> None:
        """Take the number of Gaussians of ``state``, where that is all in which it differs."""
        own = {name: value for name, value in self.state_dict().items() if name in state}
        count = len(state["means"]) if "means" in own and state["means"].ndim == 2 else len(self)
        if count == len(self) or any(state[name].shape != (count, *value.shape[1:]) for name, value in own.items()):
            return
        for name in own:
            self._put(name, state[name].to(own[name]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``means``, ``scales``, ``quaternions``, ``opacities`` and ``features``."""
        groups = {
            "means": self.means,
            "scales": self.log_scales,
            "quaternions": self.quaternions,
            "opacities": self.opacity_logits,
            "features": self.features,
        }
        return [{"name": name, "params": [parameter]} for name, parameter in groups.items()]

    def observe(self, projected: Projected, height: int, width: int) -> None:
        """Note how strongly the coming backward pass pulls at the Gaussians' places in these images."""
        means2d = projected.means2d
        if not self.grows or not means2d.requires_grad:
            return
        seen = projected.visible.detach()
        # From pixels to normalised device coordinates, and from the mean over the cameras to each of them.
        units = means2d.new_tensor([0.5 * width, 0.5 * height]) * len(means2d)

        def note(gradient: Tensor) -> None:
            norms = (gradient.detach() * units).norm(dim=-1)
            self._observed.append((torch.where(seen, norms, 0.0).sum(dim=0), seen.sum(dim=0).to(norms.dtype)))

        means2d.register_hook(note)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """Adaptive density control after the update of ``step``, and means back into the ball.

        Raises:
            ValueError: Pruning would leave nothing.
        """
        config, done = self.config.densify, step + 1
        self.means.mul_((self.radius / self.means.norm(dim=-1, keepdim=True)).clamp_max(1.0))
        observed, self._observed = self._observed, []
        if not config.enabled or done > config.end:
            return
        for gradients, views in observed:
            self.gradient_sum += gradients
            self.views_seen += views
        if config.is_due(done):
            self._densify(step, optimizer, rng.shared()("densify", step, self.device))
        if config.resets_at(done):
            limit = torch.logit(torch.tensor(2 * config.prune_opacity)).item()
            self.opacity_logits.clamp_max_(limit)
            clear_moments(optimizer, self.opacity_logits)

    def _densify(self, step: int, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Clone, split, prune; statistics begin again."""
        config, gaussians = self.config.densify, self()
        mean = torch.where(self.views_seen > 0, self.gradient_sum / self.views_seen.clamp_min(1), -1.0)
        growth = choose_growth(config, mean, gaussians.scales, self.radius)
        parts = GaussianSet(**{f.name: getattr(gaussians, f.name)[growth.split] for f in fields(GaussianSet)})
        new: dict[nn.Parameter, Tensor] = {}
        for parameter in (self.means, self.log_scales, self.quaternions, self.opacity_logits, self.features):
            twice = parameter[growth.split]
            new[parameter] = torch.cat([parameter[growth.clone], twice, twice])
        first = int(growth.clone.sum())
        new[self.means][first:] = split_means(parts, generator)
        new[self.log_scales][first:] -= torch.log(torch.tensor(config.split_factor)).item()
        spent = is_spent(config, gaussians.opacities, gaussians.scales, self.radius)
        kept = ~is_spent(config, new[self.opacity_logits].sigmoid(), new[self.log_scales].exp(), self.radius)
        keep = ~spent & ~growth.split
        if not bool(keep.any()) and not bool(kept.any()):
            raise FieldError(
                f"after step {step} every Gaussian is more transparent than prune_opacity = "
                f"{config.prune_opacity} or larger than prune_scale = {config.prune_scale} radii; change these",
                "densify",
            )
        resize_rows(optimizer, {parameter: rows[kept] for parameter, rows in new.items()}, keep)
        self._clear_statistics()

    def _clear_statistics(self) -> None:
        for name in ("gradient_sum", "views_seen"):
            self._put(name, torch.zeros_like(self.opacity_logits))

    def _assign(self, gaussians: GaussianSet) -> None:
        """Take over Gaussians, whatever their number."""
        opacities = gaussians.opacities.clamp(_LEAST_OPACITY, 1 - _LEAST_OPACITY)
        self._put("means", gaussians.means)
        self._put("log_scales", gaussians.scales.log())
        self._put("quaternions", gaussians.quaternions)
        self._put("opacity_logits", torch.logit(opacities))
        self._put("features", gaussians.features)
        self._clear_statistics()

    def _put(self, name: str, values: Tensor) -> None:
        """A parameter or buffer of other values and length."""
        parameter = self._parameters.get(name)
        if parameter is None:
            setattr(self, name, values.detach().clone())
        else:
            replace_values(parameter, values.detach().clone())

    def _as_field(self) -> GaussianField:
        """The field of the current Gaussians; kept until they change."""
        with torch.no_grad():
            now = self()
        if self._field is not None:
            last, kept = self._field
            if all(torch.equal(getattr(now, f.name), getattr(last, f.name)) for f in fields(GaussianSet)):
                return kept
        copied = GaussianSet(**{f.name: getattr(now, f.name).detach().clone() for f in fields(GaussianSet)})
        made = GaussianField(copied, self.radius, self.config.export_thickness * self.radius)
        self._field = (copied, made)
        return made

    def _initial(self, material: Material | None, generator: torch.Generator) -> GaussianSet:
        """The Gaussians that the config asks for."""
        config = self.config

        def paint(colors: Tensor) -> Tensor:
            return torch.zeros_like(colors) if material is None else material.features_of(SurfaceChannels(colors))

        if config.init_file is None:
            extent = config.init_radius * self.radius
            return gaussians_in_ball(config.num_points, extent, config.init_opacity, paint, generator, self.radius)
        if config.init == "points":
            return self._from_points(config.init_file, paint, generator)
        loaded = load_mesh(config.init_file, config.init_up)
        loaded = loaded.fitted(self.radius) if config.init_fit else loaded

        def look(points: Tensor) -> Tensor:
            if not loaded.has_colors or material is None:
                return paint(torch.full_like(points, 0.5))
            return material.features_of(loaded.look(points))

        return self._on_surface(loaded.mesh, config.init_opacity, look, generator)

    def _on_surface(self, mesh: Mesh, opacity: float, look: Look, generator: torch.Generator) -> GaussianSet:
        """On and, if that is asked for, around a mesh."""
        config = self.config
        return gaussians_on_surface(
            mesh,
            config.num_points,
            opacity,
            config.surface.thickness,
            look,
            generator,
            self.radius,
            around=config.num_around,
            distance=config.surface.distance * self.radius,
        )

    def _from_points(self, path: str, paint: Look, generator: torch.Generator) -> GaussianSet:
        """The points or Gaussians of a PLY file."""
        config = self.config
        made = gaussians_from_points(
            path,
            config.init_up,
            config.num_points,
            config.init_opacity,
            config.init_fit,
            paint,
            generator,
            self.radius,
        )
        if config.densify.enabled and len(made.means) > config.densify.max_points:
            raise FieldError(
                f"{Path(path).name} holds {len(made.means)} Gaussians, more than "
                f"densify.max_points = {config.densify.max_points}; raise it, or set densify.enabled=false",
                "init_file",
            )
        return made


_STARTS = {
    "sphere": "without a file",
    "mesh": "on the surface of a mesh file",
    "points": "at the points of a PLY file",
}
