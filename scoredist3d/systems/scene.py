"""One object as text-to-3d optimises it: geometry, material, background and the renderer over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, under
from scoredist3d.geometry.base import Geometry, fits
from scoredist3d.materials.base import Material
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.splats import Splats
from scoredist3d.renderers.base import NOTHING, Render
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import named_groups

PARTS = ("geometry", "material", "background", "renderer")


class Scene(nn.Module):
    """The four parts, built from their blocks.

    Attributes:
        blocks: The configs of the parts, by name.
        step: Optimiser steps that the state has seen (they decide the active levels of a progressive grid), those of
            the run it was taken from included; saved with the weights.
        first_step: The part of them that belongs to that run.
    """

    def __init__(
        self,
        geometry: ComponentConfig,
        material: ComponentConfig,
        background: ComponentConfig,
        renderer: ComponentConfig,
        *,
        rng: Rng,
        prior: Any = None,
    ) -> None:
        """Args:
        geometry, material, background, renderer: Their blocks.
        rng: Draws the starting values; equal on all ranks.
        prior: For materials that make its latents.
        """
        super().__init__()
        self.blocks = dict(zip(PARTS, (geometry, material, background, renderer), strict=True))
        self.material: Material = self._build("material", rng=rng, prior=prior)
        self.geometry: Geometry = self._build("geometry", rng=rng, material=self.material)
        self.background = self._build("background", rng=rng, num_channels=self.material.num_channels)
        parts = {"geometry": self.geometry, "material": self.material, "background": self.background}
        self.renderer = self._build("renderer", rng=rng, **parts)
        self.step = self.first_step = 0
        self.register_buffer("steps", torch.zeros(2, dtype=torch.long))
        self.register_load_state_dict_post_hook(_restore_steps)

    steps: Tensor

    def _build(self, name: str, **runtime: Any) -> Any:
        """One part; errors start with the path of its block."""
        with under(name, claim=True):
            return registry.build(self.blocks[name], **runtime)

    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None, needs: Set[str] = NOTHING) -> Render:
        """See :class:`~scoredist3d.renderers.base.Renderer`."""
        render: Render = self.renderer(cameras, step=step, rng=rng, needs=needs)
        return render

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``geometry.*``, ``material``, ``background`` and ``renderer`` groups, where they have parameters."""
        return [group for name in PARTS for group in named_groups(name, getattr(self, name))]

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Levels and occupancy before the run's optimiser step."""
        self._set_step(self.first_step + step)
        self.renderer.update_step(self.step, rng)

    def restore_step(self, step: int) -> None:
        """Levels as after ``step`` optimiser steps of the run; the occupancy grid is in the state."""
        self._set_step(self.first_step + step)
        self.geometry.update_step(self.step)
        self.material.update_step(self.step)

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether ``state`` is of a scene with these very parts; sizes that may change are made those of ``state``."""
        return fits(self, state)

    def continue_from(self, state: dict[str, Any]) -> None:
        """Take over another scene's ``state_dict`` and go on counting from its step."""
        self.load_state_dict(state)
        self.go_on_counting(self.step)

    def go_on_counting(self, step: int) -> None:
        """Count the run's steps from ``step`` on, what depends on them included."""
        self.first_step = step
        self.restore_step(0)

    def _set_step(self, step: int) -> None:
        self.step = step
        self.steps[0].fill_(step)
        self.steps[1].fill_(self.first_step)


def _restore_steps(scene: Any, _: Any) -> None:
    scene.step, scene.first_step = scene.steps.tolist()
    scene.geometry.update_step(scene.step)
    scene.material.update_step(scene.step)


class SceneShape:
    """A trained scene as exporters and later stages see it: where it is, and its unlit look."""

    def __init__(self, scene: Scene) -> None:
        self._geometry, self._material = scene.geometry, scene.material

    @property
    def radius(self) -> float:
        """Scene units."""
        return self._geometry.radius

    @property
    def device(self) -> torch.device:
        """Where points must be."""
        return self._geometry.device

    @property
    def iso_level(self) -> float | None:
        """Density of the surface, where known."""
        return self._geometry.iso_level

    @property
    def baked_lighting(self) -> bool:
        """Whether the base colour includes light and shade."""
        return self._material.baked_lighting

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """(N,) at (N, 3)."""
        return self._geometry.density(points)

    @torch.no_grad()
    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        """At (N, 3), where the surface has unit ``normals`` (N, 3)."""
        return self._material.channels(self._geometry.features_at(points), points=points, normals=normals)

    @torch.no_grad()
    def surface(self) -> Mesh | None:
        """The geometry's own surface, if it is one."""
        return self._geometry.surface()

    @torch.no_grad()
    def splats(self) -> Splats | None:
        """The geometry's Gaussians, if it is made of them."""
        return self._geometry.splats(
            lambda features: self._material.channels(features).base_color, self._material.harmonics
        )


def merged_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of one name joined, in the order of first appearance."""
    merged: dict[str, list[nn.Parameter]] = {}
    for group in groups:
        merged.setdefault(group["name"], []).extend(group["params"])
    return [{"name": name, "params": params} for name, params in merged.items()]
