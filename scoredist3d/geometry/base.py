"""What every geometry offers to renderers, losses, exporters and later stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, FieldError, option
from scoredist3d.meshes.exportable import Shape
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.splats import Splats
from scoredist3d.seeding import Rng

if TYPE_CHECKING:
    from scoredist3d.materials.base import Material
    from scoredist3d.ops.splatting.splat import Projected


@dataclass(frozen=True)
class GeometryOutput:
    """A field at ``N`` points.

    Attributes:
        density: (N,), extinction per scene unit, >= 0.
        features: (N, F), unbounded; the material turns them into colour.
        normal: (N, 3) unit vectors pointing out of the object, or ``None`` where not asked for.
        sdf: (N,), signed distance, negative inside, scene units; of signed distance fields only.
        gradient: (N, 3), of ``sdf``, as long as it is; of signed distance fields, where normals were asked for.
    """

    density: Tensor
    features: Tensor
    normal: Tensor | None = None
    sdf: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class SurfaceMesh:
    """A triangle mesh inside of an optimisation.

    Attributes:
        vertices: (V, 3), world, differentiable in the geometry's parameters.
        faces: (F, 3) int64, counter-clockwise seen from outside.
        uvs: (T, 2) texture coordinates, origin at the bottom left of the image, or None.
        uv_faces: (F, 3) int64, indices into ``uvs``, or None.
        fixed_topology: The faces are the same at every step, so that what is derived from them may be kept.
        rest: (V, 3), where the vertices of a fixed topology were at the start, or None.
        deviation: (D,), how unequal the distances of a dual vertex to what it is the mean of are, scene units; of dual
            surfaces only.
    """

    vertices: Tensor
    faces: Tensor
    uvs: Tensor | None = None
    uv_faces: Tensor | None = None
    fixed_topology: bool = False
    rest: Tensor | None = None
    deviation: Tensor | None = None


@dataclass(frozen=True)
class SurfacePoints:
    """``N`` points on a surface mesh, as a rasteriser finds them.

    Attributes:
        points: (N, 3), world.
        uv: (N, 2) or None where the mesh has no texture coordinates.
    """

    points: Tensor
    uv: Tensor | None = None


@dataclass(frozen=True)
class GaussianSet:
    """``N`` 3D Gaussians inside of an optimisation.

    Attributes:
        means: (N, 3), world.
        scales: (N, 3), standard deviations, scene units, > 0.
        quaternions: (N, 4), w first; normalised by whoever uses them.
        opacities: (N,), in (0, 1).
        features: (N, F), for the material.
    """

    means: Tensor
    scales: Tensor
    quaternions: Tensor
    opacities: Tensor
    features: Tensor


@dataclass(frozen=True)
class GeometryInit:
    """What a geometry can begin with in place of its own initialisation: another stage's object, or a file's.

    Attributes:
        mesh: Its surface, world coordinates.
        features: (N, 3) points -> (N, F) features that give the material its look there; None where it has none.
        shape: The object itself where it is more than a mesh.
    """

    mesh: Mesh
    features: Callable[[Tensor], Tensor] | None = None
    shape: Shape | None = None


class Geometry(nn.Module, ABC):
    """An object in the ball of ``radius`` around the origin; nothing is outside of it.

    Four kinds differ in what renderers take from them: :class:`Field`, :class:`SignedDistanceField`, :class:`Surface`
    and :class:`GaussianCloud`. What is declared here all of them have, so that any can be exported and any can start
    from any other.

    Attributes:
        radius: Scene units.
        num_features: F, the number of feature channels.
        iso_level: :meth:`density` on the surface where that is known, else None.
        grows: Parameters may change their sizes while training, which a run on several devices cannot follow.
        free_options: Names (``key`` or ``key.path``) of options that may change when another run goes on with the
            state; any other one gives the same numbers another meaning.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of every geometry."""

        radius: float = option(1.0, "Radius of the ball that holds the object, in scene units.", gt=0)

    num_features: int
    iso_level: float | None = None
    grows: bool = False
    free_options: frozenset[str] = frozenset()

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        """Args:
        config: Options.
        rng: Draws initial values; equal on all ranks.
        material: The scene's material, which sets the number of features and converts colours to features.
        """
        super().__init__()
        self.radius = config.radius

    @abstractmethod
    def density(self, points: Tensor) -> Tensor:
        """(N,) densities at (N, 3) world points, >= 0."""

    @abstractmethod
    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) features at (N, 3) world points on or near the surface."""

    def surface(self) -> Mesh | None:
        """The surface where the geometry is one, else None."""
        return None

    def splats(
        self, colors: Callable[[Tensor], Tensor], harmonics: Callable[[Tensor], Tensor | None] = lambda _: None
    ) -> Splats | None:
        """The Gaussians where the geometry is made of them, else None.

        Args:
            colors: Features (N, F) to colours (N, 3).
            harmonics: Features (N, F) to the view-dependent part (N, K, 3), or to None.
        """
        return None

    def init_from(self, start: GeometryInit, rng: Rng) -> str:
        """Take over another object's surface and look; returns a sentence on how well that went.

        Raises:
            ValueError: This geometry cannot.
        """
        raise FieldError(f"{type(self).__name__} cannot start from another representation", "type")

    def prepare_loading(self, state: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers the sizes that they have in ``state`` (names as in the own ``state_dict``).

        Called before every loading, for geometries whose sizes are not those of the config alone; what this geometry
        can never have is left as it is, so that the comparison of the shapes which follows says so.
        """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        self.prepare_loading(_below(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def update_step(self, step: int) -> None:
        """Set everything that depends on the optimiser step, from ``step`` alone, so that resuming needs no state."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """After the optimiser's update of ``step``: e.g. add or remove elements, together with their moments."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups ``{"name", "params"}``; the optimiser block may give each name its own learning rate."""
        return [{"name": "geometry", "params": list(self.parameters())}]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


class Field(Geometry):
    """A density and features at every point.

    :meth:`density` tells exporters and later stages where the surface is; :meth:`extinction` is what light meets on its
    way. For a plain density field both are the same.
    """

    @abstractmethod
    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """The field at (N, 3) world points."""

    def extinction(self, points: Tensor) -> Tensor:
        """(N,) at (N, 3): ``forward(points).density`` without the features, per scene unit."""
        return self.density(points)

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) at (N, 3)."""
        return self.forward(points).features


class SignedDistanceField(Field):
    """A field whose extinction is a function of a signed distance."""

    iso_level = 1.0

    @abstractmethod
    def sdf(self, points: Tensor) -> Tensor:
        """(N,) signed distances at (N, 3) world points, negative inside, scene units."""

    @abstractmethod
    def extinction(self, points: Tensor) -> Tensor:
        """(N,) at (N, 3), per scene unit, 0 outside the ball."""

    @abstractmethod
    def sdf_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) gradients of :meth:`sdf`, of length 1 where it is a distance; differentiable in the parameters."""

    def freeze_extinction(self) -> None:
        """Stop learning how extinction depends on the distance: a renderer with a law of its own asks for it."""

    def density(self, points: Tensor) -> Tensor:
        """(N,) exp(-sdf / (0.01 radius)) in the ball: 1 on the surface, a number without a unit.

        The contrast (d - 1) / (d + 1) that locates surfaces is then tanh of the distance, nearly linear close to it.
        """
        exponent = (self.sdf(points) * (-100.0 / self.radius)).clamp(-30.0, 30.0)
        return torch.where(points.norm(dim=-1) <= self.radius, exponent.exp(), 0.0)


class Surface(Geometry):
    """A triangle mesh with features on it."""

    @abstractmethod
    def forward(self) -> SurfaceMesh:
        """The mesh at the current parameters."""

    @abstractmethod
    def features(self, points: SurfacePoints) -> Tensor:
        """(N, F) features of points that a rasteriser has found on the mesh of :meth:`forward`."""


class GaussianCloud(Geometry):
    """3D Gaussians with features."""

    @abstractmethod
    def forward(self) -> GaussianSet:
        """The Gaussians at the current parameters."""

    def observe(self, projected: Projected, height: int, width: int) -> None:
        """Told by renderers, before the backward pass, of the Gaussians in the image planes of (height, width) images.

        For what needs the gradients there, e.g. to add Gaussians where the images are wrong.
        """


def prepare_loading(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Call :meth:`Geometry.prepare_loading` of every geometry in ``module`` with its part of ``module``'s ``state``."""
    for path, part in module.named_modules():
        if isinstance(part, Geometry):
            part.prepare_loading(_below(state, f"{path}." if path else ""))


def fits(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether ``state`` has the names and shapes of ``module``'s; sizes that may change are made those of ``state``."""
    if module.state_dict().keys() != state.keys():
        return False
    prepare_loading(module, state)
    own = module.state_dict()
    return own.keys() == state.keys() and all(value.shape == state[name].shape for name, value in own.items())


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
