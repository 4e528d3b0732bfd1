"""What every renderer takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.geometry.base import Geometry, SurfaceMesh
from scoredist3d.materials.base import Material
from scoredist3d.ops.ray_marching import RaySamples
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class SampleRecord:
    """What the losses need to know about the ``M`` samples along the B * H * W rays of a render.

    Attributes:
        samples: The intervals; rays are numbered as the pixels of a flattened (B, H, W).
        weights: (M,), share of each sample in its pixel.
        ray_directions: (B * H * W, 3) unit, world.
        normals: (M, 3) unit, outward, or ``None`` where not asked for.
    """

    samples: RaySamples
    weights: Tensor
    ray_directions: Tensor
    normals: Tensor | None

    @property
    def view_dirs(self) -> Tensor:
        """(M, 3) unit direction from the camera to each sample."""
        return self.ray_directions.index_select(0, self.samples.ray_indices)


@dataclass(frozen=True)
class Render:
    """``B`` images of the scene.

    Attributes:
        rgb: (B, H, W, 3) in [0, 1], over the background; (B, H, W, C) latents where the material makes those.
        opacity: (B, H, W, 1) in [0, 1].
        depth: (B, H, W, 1), mean distance along the ray of what the pixel shows, scene units; 0 where it shows nothing.
        background: (B, H, W, 3), what is behind (C channels where ``rgb`` has them).
        normal: (B, H, W, 3), unit world normals, zero where nothing is seen; ``None`` where not asked for.
        samples: Present while training only.
        mesh: What a rasteriser has shown, for losses on it.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    background: Tensor
    normal: Tensor | None = None
    samples: SampleRecord | None = None
    mesh: SurfaceMesh | None = None


class Renderer(nn.Module, ABC):
    """Renders a geometry with a material over a background.

    The three parts are used, not owned: they are no sub-modules, so their parameters appear once in the system's state.

    Attributes:
        renders: The kind of geometry that it takes.
    """

    renders: type[Geometry] = Geometry  # type: ignore[type-abstract]

    @dataclass
    class Config(ComponentConfig):
        """Options of every renderer (none)."""

    def __init__(self, config: Config, *, geometry: Geometry, material: Material, background: Background) -> None:
        super().__init__()
        if not isinstance(geometry, self.renders):
            raise ValueError(f"renderer.type: {type(self).__name__} cannot render {type(geometry).__name__}")
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
    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None = None, with_normal: bool = False) -> Render:
        """Render ``B`` images.

        Args:
            cameras: (B), on the device of the geometry.
            step: Optimiser step.
            rng: Source of the training randomness (jitter, background, light); ``None`` renders for evaluation.
            with_normal: Also composite normals and record those of the samples.
        """

    def update_step(self, step: int, rng: Rng) -> None:
        """To be called before every training step: sets what depends on the step, here and in the geometry."""
        self.geometry.update_step(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of the renderer's own parameters (usually none)."""
        params = list(self.parameters())
        return [{"name": "renderer", "params": params}] if params else []

    def __call__(self, cameras: Cameras, *, step: int, rng: Rng | None = None, with_normal: bool = False) -> Render:
        """See :meth:`forward`."""
        render: Render = super().__call__(cameras, step=step, rng=rng, with_normal=with_normal)
        return render


def over(rgb: Tensor, opacity: Tensor, background: Tensor) -> Tensor:
    """Premultiplied ``rgb`` (..., 3) with ``opacity`` (..., 1) over ``background`` (..., 3)."""
    return torch.addcmul(rgb + background, opacity, background, value=-1.0)
