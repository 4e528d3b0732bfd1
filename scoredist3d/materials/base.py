"""Interface of materials, and the inputs that they shade."""

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


@dataclass(frozen=True, slots=True)
class Light:
    """A point light and an ambient light for each of ``N`` images or points.

    Attributes:
        position: (N, 3), world.
        ambient: (N,), strength of the ambient light.
        diffuse: (N,), strength of the point light.
        textureless: (N,), 1 where the albedo is replaced by white, else 0.
        rotation: (N,) radians by which the environment is rotated, counter-clockwise seen from above; None for
            materials without an environment.
    """

    position: Tensor
    ambient: Tensor
    diffuse: Tensor
    textureless: Tensor
    rotation: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> Light:
        """The lights at a slice or at (M,) indices, such as the image index of each sample point."""
        rotation = None if self.rotation is None else self.rotation[index]
        return Light(self.position[index], self.ambient[index], self.diffuse[index], self.textureless[index], rotation)


@dataclass(frozen=True, slots=True)
class ShadingInputs:
    """``N`` points to be shaded. Renderers set the optional values that the material requires.

    Attributes:
        features: (N, num_features), features of the geometry.
        points: (N, 3), world.
        normals: (N, 3), unit, outward; set where the points are lit or ``Material.needs_normal`` is true.
        view_dirs: (N, 3), unit, from the camera to the point; set where ``Material.needs_view_dirs`` is true.
        light: One light per point; None for the unlit color.
    """

    features: Tensor
    points: Tensor | None = None
    normals: Tensor | None = None
    view_dirs: Tensor | None = None
    light: Light | None = None


class Material(nn.Module, ABC):
    """Base class of materials, which map geometry features to colors in [0, 1].

    Attributes:
        num_features: Feature channels expected from the geometry.
        num_channels: Channels returned by :meth:`forward`: 3, or the number of the prior's latent channels.
        outputs_latents: Whether renders are latents, which the guidance uses without the prior's encoder.
        needs_normal: Whether :meth:`forward` needs normals even without a light.
        needs_view_dirs: Whether :meth:`forward` needs view directions.
        baked_lighting: Whether the base color of :meth:`channels` includes lighting, so that viewers must not light it
            again. False for a material that shades its colors with a light.
        free_options: Options that may differ between a run and a later run that continues from its state (see
            :class:`~scoredist3d.geometry.base.Geometry`).
    """

    @dataclass
    class Config(ComponentConfig):
        """Options shared by all materials (none)."""

    num_features: int = 3
    num_channels: int = 3
    outputs_latents: bool = False
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
    def forward(self, inputs: ShadingInputs) -> Tensor:
        """Shaded colors.

        Args:
            inputs: N points.

        Returns:
            (N, num_channels), colors in [0, 1], or latents where ``outputs_latents`` is true.
        """

    @abstractmethod
    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """Unlit appearance of the surface, as stored in exported textures.

        Args:
            inputs: N points. View directions and light are ignored; normals are needed for shading normals only.
        """

    def harmonics(self, features: Tensor) -> Tensor | None:
        """(N, K, 3) spherical harmonics of degrees 1 and above, as stored in splat files; None if the colors are not
        stored as spherical harmonics.

        Args:
            features: (N, num_features).
        """
        return None

    def update_step(self, step: int) -> None:
        """Set all step-dependent values from the optimizer step alone, so that a resumed run needs no further state."""

    def display(self, values: Tensor) -> Tensor:
        """(..., 3) displayable colors in [0, 1] of (..., num_channels) rendered values."""
        return values

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, num_features) features for which :meth:`channels` best approximates ``channels``.

        Raises:
            ValueError: The colors of this material are not a function of the features of single points.
        """
        raise ValueError(
            f"material.type: {type(self).__name__} cannot start from the colors of another object; choose another "
            "material"
        )

    def sample_light(self, cameras: Cameras, step: int, generator: torch.Generator | None) -> Light | None:
        """The light of each image of a step; None where the images are unlit.

        Args:
            cameras: Cameras of the ``B`` images.
            step: Optimizer step.
            generator: Random generator of the step; None in evaluation, which is deterministic.
        """
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups ``{"name", "params"}``; empty for a material without parameters."""
        params = list(self.parameters())
        return [{"name": "material", "params": params}] if params else []


class AlbedoMaterial(Material):
    """Base class of materials with three features per point, the logits of its albedo."""

    def albedo(self, features: Tensor) -> Tensor:
        """(N, 3) in [0, 1]: the sigmoid of the features."""
        return features.sigmoid()

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """The albedo as the base color."""
        return SurfaceChannels(self.albedo(inputs.features))

    def features_of(self, channels: SurfaceChannels) -> Tensor:
        """(N, 3): the logit of the base color."""
        return logit(channels.base_color)


def logit(colors: Tensor, margin: float = 1e-3) -> Tensor:
    """Inverse of the sigmoid for values in [0, 1], clamped to [margin, 1 - margin] to stay finite."""
    return torch.logit(colors, eps=margin)
