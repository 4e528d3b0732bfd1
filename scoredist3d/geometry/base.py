"""Base classes for geometries, and the data types that they pass to renderers, losses and later stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, option
from scoredist3d.meshes.exportable import Exportable
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.splats import Splats
from scoredist3d.seeding import Rng

if TYPE_CHECKING:
    from scoredist3d.materials.base import Material

PointFunction = Callable[[Tensor], Tensor]
"""Map from (N, 3) world points to (N, F) feature vectors."""


@dataclass(frozen=True)
class GeometryOutput:
    """Values of a field at ``N`` points.

    Attributes:
        density: (N,), extinction per scene unit, >= 0.
        features: (N, F), unbounded; the material turns them into color.
        normal: (N, 3), outward unit normals; ``None`` if not requested.
        sdf: (N,), signed distance in scene units, negative inside; ``None`` for density fields.
        gradient: (N, 3), gradient of ``sdf``, not normalized; ``None`` without ``sdf`` or without ``normal``.
    """

    density: Tensor
    features: Tensor
    normal: Tensor | None = None
    sdf: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class SurfaceMesh:
    """A differentiable triangle mesh.

    Attributes:
        vertices: (V, 3), world, differentiable in the geometry's parameters.
        faces: (F, 3) int64, counter-clockwise seen from outside.
        uvs: (T, 2), texture coordinates with the origin at the bottom left of the image, or None.
        uv_faces: (F, 3) int64, indices into ``uvs``, or None.
        fixed_topology: Whether the faces are the same at every step, so that results derived from them can be cached.
        rest: (V, 3), the undeformed vertices of a mesh with fixed topology, or None.
        deviation: (D,), for each dual vertex of a dual surface, the mean absolute deviation of its distances to the
            points that it averages, scene units; otherwise None.
    """

    vertices: Tensor
    faces: Tensor
    uvs: Tensor | None = None
    uv_faces: Tensor | None = None
    fixed_topology: bool = False
    rest: Tensor | None = None
    deviation: Tensor | None = None

    def to_mesh(self) -> Mesh:
        """A detached copy of the mesh, as NumPy arrays."""

        def array(values: Tensor, dtype: type) -> np.ndarray:
            return values.detach().cpu().numpy().astype(dtype)

        return Mesh(
            array(self.vertices, np.float32),
            array(self.faces, np.int64),
            uvs=None if self.uvs is None else array(self.uvs, np.float32),
            uv_faces=None if self.uv_faces is None else array(self.uv_faces, np.int64),
        )


@dataclass(frozen=True)
class SurfacePoints:
    """``N`` points on a surface mesh, as found by a rasterizer.

    Attributes:
        points: (N, 3), world.
        uv: (N, 2), texture coordinates; None for a mesh without them.
    """

    points: Tensor
    uv: Tensor | None = None


@dataclass(frozen=True)
class GaussianSet:
    """``N`` differentiable 3D Gaussians.

    Attributes:
        means: (N, 3), world.
        scales: (N, 3), standard deviations along the local axes, scene units, > 0.
        quaternions: (N, 4), rotations from local to world axes, w first, not necessarily normalized.
        opacities: (N,), in (0, 1).
        features: (N, F), input of the material.
    """

    means: Tensor
    scales: Tensor
    quaternions: Tensor
    opacities: Tensor
    features: Tensor


@dataclass(frozen=True)
class ScreenSpaceMeans:
    """The means of ``N`` Gaussians in the image planes of ``B`` cameras.

    Attributes:
        means2d: (B, N, 2), pixels; part of the autograd graph of the rendered images.
        visible: (B, N) bool, whether the Gaussian contributes to the image.
        height, width: Size of the images in pixels.
    """

    means2d: Tensor
    visible: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class GeometryInit:
    """The object that a geometry is initialized from: the result of another stage, or a mesh file.

    Attributes:
        mesh: Surface of the object, world coordinates.
        features: Features that make the material reproduce the object's colors; None if the object has no colors.
        shape: The original object, which also gives density and colors; None if only the mesh is known.
    """

    mesh: Mesh
    features: PointFunction | None = None
    shape: Exportable | None = None


class DensificationStrategy(Protocol):
    """A strategy that adds and removes elements of a geometry during training, like the strategies of gsplat."""

    @property
    def enabled(self) -> bool:
        """Whether the number of elements can change."""

    def step_pre_backward(self, projection: ScreenSpaceMeans) -> None:
        """Retain the gradients that the strategy needs; called for every training render before its backward pass."""

    def step_post_backward(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """Update the elements and their optimizer state; called once after the optimizer's update of ``step``.

        ``rng`` must be equal on all ranks.
        """


class Geometry(nn.Module, ABC):
    """An object inside the ball of ``radius`` around the origin.

    Every geometry has a density and features at any point, which export and conversion sample. Further capabilities
    are optional; :mod:`scoredist3d.geometry.protocols` lists them.

    Attributes:
        radius: Radius of the ball, scene units.
        num_features: F, the number of feature channels.
        iso_level: Value of :meth:`density` on the surface; None if it has to be estimated.
        densification: Strategy that changes the number of elements during training, or None.
        free_options: Options (``key`` or ``key.path``) that may differ when a run continues from a saved state. A
            different value of any other option changes the meaning of the saved parameters.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options shared by all geometries."""

        radius: float = option(1.0, "Radius of the ball that contains the object, in scene units.", gt=0)

    num_features: int
    iso_level: float | None = None
    densification: DensificationStrategy | None = None
    free_options: frozenset[str] = frozenset()

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        """Args:
        config: Options.
        rng: Random streams for the initial values; equal on all ranks.
        material: The scene's material, which sets the number of features and converts colors to features.
        """
        super().__init__()
        self.radius = config.radius

    @abstractmethod
    def density(self, points: Tensor) -> Tensor:
        """(N,) densities at (N, 3) world points, >= 0."""

    @abstractmethod
    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) features at (N, 3) world points on or near the surface."""

    @property
    def densifies(self) -> bool:
        """Whether the sizes of parameters can change during training."""
        return self.densification is not None and self.densification.enabled

    def prepare_loading(self, state: Mapping[str, Tensor]) -> None:
        """Resize parameters and buffers to the sizes in ``state`` (names as in this geometry's ``state_dict``).

        Called before a state is loaded. Geometries whose sizes depend on more than the config override this method.
        Incompatible shapes are left for the loader to report.
        """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        self.prepare_loading(_without_prefix(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def update_step(self, step: int) -> None:
        """Update everything that depends on the optimizer step; use only ``step``, so that resuming needs no state."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups ``{"name", "params"}``; the optimizer config may give each name its own learning rate."""
        return [{"name": "geometry", "params": list(self.parameters())}]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device


class Field(Geometry):
    """Base class of density fields.

    :meth:`density` locates the surface for export and conversion; :meth:`extinction` is the coefficient that volume
    rendering integrates. The two are equal for a plain density field.
    """

    @abstractmethod
    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """Values of the field at (N, 3) world points."""

    def extinction(self, points: Tensor) -> Tensor:
        """(N,) extinction per scene unit at (N, 3) world points: ``forward(points).density``, without the features."""
        return self.density(points)

    def features_at(self, points: Tensor) -> Tensor:
        """(N, F) features at (N, 3) world points."""
        return self.forward(points).features


class SignedDistanceField(Field):
    """Base class of fields whose extinction is a function of a signed distance."""

    iso_level = 1.0

    @abstractmethod
    def sdf(self, points: Tensor) -> Tensor:
        """(N,) signed distances at (N, 3) world points, negative inside, scene units."""

    @abstractmethod
    def extinction(self, points: Tensor) -> Tensor:
        """(N,) extinction per scene unit at (N, 3) world points, 0 outside the ball."""

    @abstractmethod
    def sdf_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) gradients of :meth:`sdf`, of length 1 for an exact distance; differentiable in the parameters."""

    def freeze_extinction(self) -> None:
        """Stop learning the map from distance to extinction; called by renderers that use their own map (NeuS)."""

    def density(self, points: Tensor) -> Tensor:
        """(N,) :func:`distance_density` of the signed distances at (N, 3) points."""
        return distance_density(self.sdf(points), points, self.radius)


class Surface(Geometry):
    """Base class of triangle meshes with features."""

    @abstractmethod
    def forward(self) -> SurfaceMesh:
        """The mesh at the current parameters."""

    @abstractmethod
    def features(self, points: SurfacePoints) -> Tensor:
        """(N, F) features of points on the mesh of :meth:`forward`."""

    @torch.no_grad()
    def surface(self) -> Mesh:
        """The mesh as NumPy arrays."""
        return self.forward().to_mesh()


class GaussianCloud(Geometry):
    """Base class of sets of 3D Gaussians with features."""

    @abstractmethod
    def forward(self) -> GaussianSet:
        """The Gaussians at the current parameters."""

    @torch.no_grad()
    def splats(
        self, colors: Callable[[Tensor], Tensor], harmonics: Callable[[Tensor], Tensor | None] = lambda _: None
    ) -> Splats:
        """The Gaussians with their colors, for export.

        Args:
            colors: Maps features (N, F) to colors (N, 3).
            harmonics: Maps features (N, F) to spherical-harmonics coefficients (N, K, 3) above degree 0, or to None.
        """
        gaussians = self.forward()
        return Splats(
            gaussians.means.clone(),
            gaussians.scales,
            nn.functional.normalize(gaussians.quaternions, dim=-1),
            gaussians.opacities,
            colors(gaussians.features),
            harmonics(gaussians.features),
        )


def distance_density(distances: Tensor, points: Tensor, radius: float) -> Tensor:
    """(N,) exp(-distance / (0.01 radius)) inside the ball, 0 outside: dimensionless, 1 on the surface.

    The contrast (d - 1) / (d + 1), which is used to locate surfaces, then equals tanh(-distance / (0.02 radius)), which
    is nearly linear close to the surface.

    Args:
        distances: (N,), signed distances, negative inside, scene units.
        points: (N, 3), world.
        radius: Radius of the ball, scene units.
    """
    exponent = (distances * (-100.0 / radius)).clamp(-30.0, 30.0)
    return torch.where(points.norm(dim=-1) <= radius, exponent.exp(), 0.0)


def prepare_loading(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Call :meth:`Geometry.prepare_loading` on each geometry in ``module``, with its own entries of ``state``."""
    for path, part in module.named_modules():
        if isinstance(part, Geometry):
            part.prepare_loading(_without_prefix(state, f"{path}." if path else ""))


def fits(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether ``module``'s state has the names and shapes of ``state``, once resizable tensors have been resized."""
    if module.state_dict().keys() != state.keys():
        return False
    prepare_loading(module, state)
    own = module.state_dict()
    return own.keys() == state.keys() and all(value.shape == state[name].shape for name, value in own.items())


def _without_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names start with ``prefix``, with the prefix removed from their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
