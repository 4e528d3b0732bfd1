"""What every material offers to renderers and exporters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.seeding import Rng


@dataclass(frozen=True)
class Light:
    """One point light with ambient light for each of ``N`` images or points.

    Attributes:
        position: (N, 3), world.
        ambient: (N,), strength of the light that comes from everywhere.
        diffuse: (N,), strength of the point light.
        textureless: (N,), 1 where the albedo is replaced by white, else 0.
        rotation: (N,) radians that the environment is turned by, counter-clockwise seen from above; None where the
            material has no environment.
    """

    position: Tensor
    ambient: Tensor
    diffuse: Tensor
    textureless: Tensor
    rotation: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Light:
        """The lights at (M,) indices, e.g. of the image that each sample point belongs to."""
        rotation = None if self.rotation is None else self.rotation[index]
        return Light(self.position[index], self.ambient[index], self.diffuse[index], self.textureless[index], rotation)


class Material(nn.Module, ABC):
    """Turns geometry features into colours in [0, 1].

    Attributes:
        num_features: Feature channels expected from the geometry.
        num_channels: Channels of what :meth:`forward` returns: 3, or those of the prior's latents.
        makes_latents: Renders are latents that go to the guidance as they are, not images that the prior encodes.
        needs_normal: :meth:`forward` needs normals at every step, whether there is a light or not.
        needs_view_dirs: :meth:`forward` needs the directions of view.
        baked_lighting: The base colour of :meth:`channels` includes light and shade, so a viewer must not light it
            again. False for a material whose colours are shaded by a light.
        free_options: Options that may change when another run goes on with the state, see
            :class:`~scoredist3d.geometry.base.Geometry`.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of every material (none)."""

    num_features: int = 3
    num_channels: int = 3
    makes_latents: bool = False
    needs_normal: bool = False
    needs_view_dirs: bool = False
    baked_lighting: bool = False
    free_options: frozenset[str] = frozenset()

    def __init__(self, config: Config, *, rng: Rng | None = None, prior: Any = None) -> None:
        """Args:
        config: Options.
        rng: Draws initial values; equal on all ranks.
        prior: The run's :class:`~scoredist3d.priors.base.Prior`, for materials that render its latents.
        """
        super().__init__()

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        *,
        normals: Tensor | None = None,
        view_dirs: Tensor | None = None,
        points: Tensor | None = None,
        light: Light | None = None,
    ) -> Tensor:
        """Colours of ``N`` points.

        Args:
            features: (N, num_features).
            normals: (N, 3) unit, outward; given where ``sample_light`` returned a light or ``needs_normal`` is set.
            view_dirs: (N, 3) unit, from the camera to the point; given where ``needs_view_dirs`` is set.
            points: (N, 3), world.
            light: One per point, or ``None`` for the colour without what ``sample_light`` may add.

        Returns:
            (N, num_channels), colours in [0, 1] unless the material makes latents.
        """

    @abstractmethod
    def channels(
        self, features: Tensor, *, points: Tensor | None = None, normals: Tensor | None = None
    ) -> SurfaceChannels:
        """How the surface looks without any light, as exported textures hold it.

        Args:
            features: (N, num_features).
            points: (N, 3), world.
            normals: (N, 3), unit, outward; where given, the shading normals can be told.
        """

    def harmonics(self, features: Tensor) -> Tensor | None:
        """(N, K, 3) coefficients of the view-dependent part of the colour, as splat files hold it; None without one."""
        return None

    def update_step(self, step: int) -> None:
        """Set everything that depends on the optimiser step, from ``step`` alone, so that resuming needs no state."""

    def display(self, values: Tensor) -> Tensor:
        """(..., 3) in [0, 1] to look at, of (..., num_channels) rendered values."""
        return values

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, num_features) features that :meth:`channels` turns into ``channels``, as well as this material can.

        Raises:
            ValueError: The material's colours are no function of single points' features.
        """
        raise ValueError(f"material.type: {type(self).__name__} cannot take over the colours of another object")

    def sample_light(self, cameras: Cameras, step: int, generator: torch.Generator | None) -> Light | None:
        """The light of each image of a step; ``None`` where the material needs none, and so no normals either.

        Args:
            cameras: (B).
            step: Optimiser step.
            generator: Of this step; ``None`` in evaluation, which must not be random.
        """
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups ``{"name", "params"}``; empty for a material without parameters."""
        params = list(self.parameters())
        return [{"name": "material", "params": params}] if params else []


def logit(colors: Tensor, margin: float = 1e-3) -> Tensor:
    """Inverse of the sigmoid for values in [0, 1], kept ``margin`` away from both ends so that it stays finite."""
    return torch.logit(colors, eps=margin)
