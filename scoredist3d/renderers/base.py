"""What every renderer takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, FieldError
from scoredist3d.geometry.base import Geometry, SurfaceMesh
from scoredist3d.materials.base import Material
from scoredist3d.seeding import Rng

NOTHING: frozenset[str] = frozenset()
"""No maps beyond colour, opacity and depth."""


@dataclass(frozen=True)
class Render:
    """``B`` images of the scene.

    Maps that default to ``None`` are made only where they are asked for by their name (``needs``).

    Attributes:
        rgb: (B, H, W, 3) in [0, 1], over the background; (B, H, W, C) latents where the material makes those.
        opacity: (B, H, W, 1) in [0, 1].
        depth: (B, H, W, 1), mean distance along the ray of what the pixel shows, scene units; 0 where it shows nothing.
        background: (B, H, W, 3), what is behind (C channels where ``rgb`` has them).
        normal: (B, H, W, 3), unit world normals, zero where nothing is seen.
        position: (B, H, W, 3), the world point at ``depth``, not differentiated; means something where something is.
        depth_variance: (B, H, W, 1), sum_i w_i (t_i - depth)^2 / opacity over the samples of each ray, scene units^2.
        orientation: (B, H, W, 1), sum_i sg(w_i) max(0, n_i . v)^2, n_i the samples' outward normals and v the ray's
            direction: 0 where all that is seen faces the camera.
        distortion: (B, H, W, 1), sum_ij w_i w_j |t_i - t_j| / (2 radius) + sum_i w_i^2 dt_i / (6 radius), how far the
            weights are spread (mip-NeRF 360, arXiv 2111.12077, equation 15).
        auxiliary: Scalars that train the renderer's own parameters and nothing else; to be added to the objective.
        mesh: What a rasteriser has shown, for losses on it.
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
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    mesh: SurfaceMesh | None = None

    def get(self, name: str) -> Tensor:
        """The map called ``name``.

        Raises:
            ValueError: It was not asked for, or this renderer makes none.
        """
        found: Tensor | None = getattr(self, name)
        if found is None:
            raise ValueError(f"the render holds no {name}; ask the renderer for it with needs={{'{name}'}}")
        return found


class Renderer(nn.Module, ABC):
    """Renders a geometry with a material over a background.

    The three parts are used, not owned: they are no sub-modules, so their parameters appear once in the system's state.

    Attributes:
        supports: The kind of geometry that it takes.
        outputs: Names of the maps of :class:`Render` that can be asked of it.
    """

    supports: type[Geometry] = Geometry  # type: ignore[type-abstract]
    outputs: frozenset[str] = frozenset({"normal"})

    @dataclass
    class Config(ComponentConfig):
        """Options of every renderer (none)."""

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
        geometry: The geometry to render, of the class that ``supports`` names.
        material: Turns features of the geometry into colours.
        background: Colours behind the object.
        rng: Draws initial values of the renderer's own networks; equal on all ranks.

        Raises:
            ValueError: The geometry is of another kind, or its number of features is not that of the material.
        """
        super().__init__()
        if not isinstance(geometry, self.supports):
            raise FieldError(f"{type(self).__name__} cannot render {type(geometry).__name__}", "type")
        if geometry.num_features != material.num_features:
            raise ValueError(
                f"geometry.num_features is {geometry.num_features}, but the material takes {material.num_features}; "
                f"set geometry.num_features={material.num_features}"
            )
        self._parts = (geometry, material, background)  # in a tuple, nn.Module does not register them

    @property
    def geometry(self) -> Geometry:
        """Where the density and the features come from."""
        return self._parts[0]

    @property
    def material(self) -> Material:
        """What turns features into colour."""
        return self._parts[1]

    @property
    def background(self) -> Background:
        """What is behind the object."""
        return self._parts[2]

    @abstractmethod
    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = NOTHING) -> Render:
        """Render ``B`` images.

        Args:
            cameras: (B), on the device of the geometry.
            step: Optimiser step.
            rng: Source of the training randomness (jitter, background, light); ``None`` renders for evaluation.
            needs: Names of the maps of :class:`Render` to make beside colour, opacity and depth.
        """

    def update_step(self, step: int, rng: Rng) -> None:
        """To be called before every training step: sets what depends on the step, here and in the parts."""
        self.geometry.update_step(step)
        self.material.update_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of the renderer's own parameters (usually none)."""
        params = list(self.parameters())
        return [{"name": "renderer", "params": params}] if params else []

    def __call__(self, cameras: Cameras, *, step: int, rng: Rng | None = None, needs: Set[str] = NOTHING) -> Render:
        """See :meth:`forward`.

        Raises:
            ValueError: ``needs`` names a map that this renderer does not make.
        """
        if not needs <= self.outputs:
            lacking, known = (", ".join(sorted(names)) for names in (needs - self.outputs, self.outputs))
            raise ValueError(f"renderer.type: {type(self).__name__} makes no {lacking}, only {known or 'colour'}")
        render: Render = super().__call__(cameras, step=step, rng=rng, needs=needs)
        return render


def over(rgb: Tensor, opacity: Tensor, background: Tensor) -> Tensor:
    """Premultiplied ``rgb`` (..., 3) with ``opacity`` (..., 1) over ``background`` (..., 3)."""
    return torch.addcmul(rgb + background, opacity, background, value=-1.0)
