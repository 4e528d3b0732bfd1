"""Interface of renderers, and the images that they return."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, FieldError
from scoredist3d.geometry.base import Geometry, ScreenSpaceMeans, SurfaceMesh
from scoredist3d.materials.base import Material
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class Render:
    """``B`` rendered images of a scene.

    Maps with the default None are rendered only if ``needs`` names them.

    Attributes:
        rgb: (B, H, W, 3) in [0, 1], composited over the background; (B, H, W, C) for a material that outputs latents.
        opacity: (B, H, W, 1) in [0, 1].
        depth: (B, H, W, 1), weighted mean distance of the samples along the ray, scene units; 0 where the opacity is 0.
        background: (B, H, W, 3), or C channels like ``rgb``.
        normal: (B, H, W, 3), unit world normals; zero where the opacity is 0.
        position: (B, H, W, 3), the world point at ``depth``, detached; undefined where the opacity is 0.
        depth_variance: (B, H, W, 1), sum_i w_i (t_i - depth)^2 / opacity over the samples of each ray, scene units^2.
        orientation: (B, H, W, 1), sum_i sg(w_i) max(0, n_i . v)^2, with n_i the outward normals of the samples and v
            the ray direction; 0 where all visible surfaces face the camera.
        distortion: (B, H, W, 1), sum_ij w_i w_j |t_i - t_j| / (2 radius) + sum_i w_i^2 dt_i / (6 radius), the spread of
            the weights along the ray (mip-NeRF 360, arXiv 2111.12077, equation 15).
        auxiliary_losses: Scalar losses for the parameters of the renderer itself, to be added to the objective.
        mesh: The rasterized mesh, for mesh losses; None for other renderers.
        projection: Projected means of splatted Gaussians, for densification; None for other renderers.
        cameras: The B cameras, for losses that need them; the objective sets them.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    background: Tensor
    normal: Tensor | None = None
    position: Tensor | None = None
    depth_variance: Tensor | None = None
    orientation: Tensor | None = None
    distortion: Tensor | None = None
    auxiliary_losses: Mapping[str, Tensor] = field(default_factory=dict)
    mesh: SurfaceMesh | None = None
    projection: ScreenSpaceMeans | None = None
    cameras: Cameras | None = None

    def get(self, name: str) -> Tensor:
        """The map called ``name``.

        Raises:
            ValueError: The map was not rendered.
        """
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise ValueError(f"the render has no map {name!r}; call the renderer with needs={{'{name}'}}")
        return found


class Renderer(nn.Module, ABC):
    """Base class of renderers, which render a geometry with a material over a background.

    These three modules are not sub-modules of the renderer, so a ``state_dict`` that includes the renderer contains
    their parameters only once.

    Attributes:
        supports: Protocol of :mod:`scoredist3d.geometry.protocols` (or base class) that the geometry must satisfy.
        outputs: Names of the optional maps of :class:`Render` that the renderer provides.
    """

    supports: type = Geometry
    outputs: frozenset[str] = frozenset({"normal"})

    @dataclass
    class Config(ComponentConfig):
        """Options shared by all renderers (none)."""

    def __init__(
        self,
        config: Config,
        *,
        geometry: Geometry,
        material: Material,
        background: Background,
        rng: Rng | None = None,
    ) -> None:
        """Args:
        config: Options.
        geometry: The geometry to render, which must satisfy :attr:`supports`.
        material: Converts features of the geometry to colors.
        background: Colors behind the object.
        rng: Random streams for the initial values of the renderer's own networks; equal on all ranks.

        Raises:
            ValueError: The geometry does not satisfy :attr:`supports`, or the numbers of features of the geometry and
                the material differ.
        """
        super().__init__()
        if not isinstance(geometry, self.supports):
            raise FieldError(
                f"{type(self).__name__} cannot render {type(geometry).__name__}; it needs a {self.supports.__name__}",
                "type",
            )
        if geometry.num_features != material.num_features:
            raise ValueError(
                f"geometry.num_features is {geometry.num_features}, but the material takes {material.num_features}; "
                f"set geometry.num_features={material.num_features}"
            )
        self._geometry = Unregistered(geometry)
        self._material = Unregistered(material)
        self._background = Unregistered(background)

    @property
    def geometry(self) -> Geometry:
        """The rendered geometry."""
        return self._geometry.value

    @property
    def material(self) -> Material:
        """The material of the geometry."""
        return self._material.value

    @property
    def background(self) -> Background:
        """The background of the images."""
        return self._background.value

    def with_appearance(self, material: Material, background: Background) -> Self:
        """A renderer of the same geometry, with the same state, that uses another material and background.

        Args:
            material: Must take as many features as the present material.
            background: Must provide as many channels as ``material`` returns.
        """
        other = copy.copy(self)
        other._material, other._background = Unregistered(material), Unregistered(background)
        return other

    @abstractmethod
    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = frozenset()) -> Render:
        """Render ``B`` images.

        Args:
            cameras: (B), on the device of the geometry.
            step: Optimizer step.
            rng: Random streams for training (jitter, background, light); None renders for evaluation.
            needs: Names of the optional maps of :class:`Render` to render in addition.
        """

    def update_step(self, step: int, rng: Rng) -> None:
        """Set all step-dependent values of the renderer, geometry and material; called before each training step."""
        self.geometry.update_step(step)
        self.material.update_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the renderer's own parameters; usually empty."""
        params = list(self.parameters())
        return [{"name": "renderer", "params": params}] if params else []

    def __call__(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = frozenset()) -> Render:
        """Check ``needs`` and call :meth:`forward`.

        Raises:
            ValueError: ``needs`` names a map that the renderer does not provide.
        """
        if not needs <= self.outputs:
            missing, known = (", ".join(sorted(names)) for names in (needs - self.outputs, self.outputs))
            raise ValueError(
                f"renderer.type: {type(self).__name__} does not provide the maps {missing}; it provides "
                f"{known or 'color, opacity and depth only'}"
            )
        render: Render = super().__call__(cameras, step=step, rng=rng, needs=needs)
        return render


def over(rgb: Tensor, opacity: Tensor, background: Tensor) -> Tensor:
    """Composite premultiplied ``rgb`` (..., C) with ``opacity`` (..., 1) over ``background`` (..., C)."""
    return torch.addcmul(rgb + background, opacity, background, value=-1.0)
