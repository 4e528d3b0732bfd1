"""Text to 3D: render views of one scene and let the prior judge them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scoredist3d.config import ComponentConfig, component, component_map
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.materials.base import Material
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import System, TrainingStep, build_component, named_groups

if TYPE_CHECKING:
    from scoredist3d.config.experiment import PreviewConfig, TurntableConfig


@register("system", "text-to-3d", summary="Optimise a scene so that its rendered views look like the prompt.")
class TextTo3D(System):
    """Cameras -> renderer -> prior.encode -> guidance, plus weighted regularisers."""

    @dataclass
    class Config(System.Config):
        """Blocks of the representation and the regularisers."""

        geometry: ComponentConfig = component("geometry", "implicit-volume", "Density and features of the object.")
        material: ComponentConfig = component("material", "no-material", "From features to colour.")
        background: ComponentConfig = component("background", "random", "What is behind the object.")
        renderer: ComponentConfig = component("renderer", "volume", "From scene and cameras to images.")
        loss: dict[str, ComponentConfig] = component_map("loss", "Regularisers and their weights.")

        def validate(self) -> list[str]:
            """A canvas has no density to render."""
            problems = super().validate()
            if self.geometry is not None and self.geometry.type == "image-canvas":
                problems.append(
                    "geometry.type: image-canvas cannot be rendered from cameras; use system.type=text-to-2d"
                )
            return problems

    video_name = "turntable"

    def __init__(
        self,
        config: Config,
        *,
        prior: nn.Module,
        prompt: str,
        negative_prompt: str = "",
        cameras: Any = None,
        rng: Rng | None = None,
    ) -> None:
        super().__init__(config, prior=prior, prompt=prompt, negative_prompt=negative_prompt, rng=rng)
        if cameras is None:
            raise ValueError("text-to-3d needs a camera sampler: pass cameras=registry.build(config.data)")
        rng = (rng or Rng()).shared()
        self.cameras = cameras
        self.geometry = build_component(config.geometry, rng=rng)
        self.material = build_component(config.material, rng=rng)
        self.background = build_component(config.background, rng=rng)
        self.renderer = build_component(
            config.renderer, geometry=self.geometry, material=self.material, background=self.background, rng=rng
        )
        self.losses = {name: build_component(block) for name, block in config.loss.items()}
        self.step = 0

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """Loss of one batch of views."""
        losses = {name: loss for name, loss in self.losses.items() if loss.weight(step) != 0.0}
        cameras = self.cameras.sample(step, rng).to(self.device)
        render = self.renderer(
            cameras, step=step, rng=rng, with_normal=any(loss.needs_normal for loss in losses.values())
        )
        latents = self.prior.encode(render.rgb, rng("encode", step, self.device))
        guided = self.guide(latents, self.prompts(cameras), step, rng, rgb=render.rgb, opacity=render.opacity)
        total, terms = self._regularised(guided.loss, losses, render, step)
        return TrainingStep(total, guided.scalars | terms | {"opacity": render.opacity.detach().mean()})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``geometry.*``, ``material``, ``background`` and ``renderer`` groups, where they have parameters."""
        parts = {name: getattr(self, name) for name in ("geometry", "material", "background", "renderer")}
        return [group for name, part in parts.items() for group in named_groups(name, part)]

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Levels and occupancy."""
        self.step = step
        self.renderer.update_step(step, rng)

    def restore_step(self, step: int) -> None:
        """Levels as after ``step`` optimiser steps; the occupancy grid is in the checkpoint."""
        self.step = step
        self.geometry.update_step(step)

    def preview(self, config: PreviewConfig) -> dict[str, Tensor]:
        """Colour, opacity and depth (near is bright) of views around the object."""
        renders = list(self._views(config.azimuths, config.elevation, config.size, config.size))
        opacity = torch.cat([render.opacity for render in renders])
        depth = torch.cat([render.depth for render in renders])
        return {
            "rgb": torch.cat([render.rgb for render in renders]),
            "opacity": opacity.expand(*opacity.shape[:-1], 3),
            "depth": depth_image(depth, opacity).expand(*depth.shape[:-1], 3),
        }

    def frames(self, config: TurntableConfig, snapshots: Sequence[Path]) -> Iterator[Tensor]:
        """One turn around the object."""
        azimuths = [360.0 * index / config.frames for index in range(config.frames)]
        for render in self._views(azimuths, config.elevation, config.height, config.width):
            yield render.rgb[0]

    def export_field(self) -> SceneField:
        """Density and unlit colour."""
        return SceneField(self.geometry, self.material)

    @torch.no_grad()
    def _views(self, azimuths: Sequence[float], elevation: float, height: int, width: int) -> Iterator[Render]:
        """Renders from one camera each, at the evaluation distance and field of view of the camera block."""
        cameras = self.cameras.evaluation(azimuths, elevation, height, width)
        for index in range(len(cameras)):
            yield self.renderer(cameras[index].to(self.device), step=self.step, rng=None)

    def _regularised(
        self, guided: Tensor, losses: dict[str, Loss], render: Render, step: int
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Sum of the guidance's loss and the weighted terms; each term for the log, raw and weighted."""
        total = guided
        scalars: dict[str, Tensor | float] = {}
        for name, loss in losses.items():
            value = loss(render, self.geometry, step)
            weighted = loss.weight(step) * value
            total = total + weighted
            scalars[f"loss/{name}"] = value.detach()
            scalars[f"weighted/{name}"] = weighted.detach()
        return total, scalars


class SceneField:
    """A trained scene as exporters see it."""

    def __init__(self, geometry: Geometry, material: Material) -> None:
        self._geometry, self._material = geometry, material

    @property
    def radius(self) -> float:
        """Scene units."""
        return self._geometry.radius

    @property
    def device(self) -> torch.device:
        """Where points must be."""
        return self._geometry.device

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """(N,) at (N, 3)."""
        return self._geometry.density(points)

    @torch.no_grad()
    def color(self, points: Tensor) -> Tensor:
        """(N, 3) in [0, 1] at (N, 3)."""
        return self._material.albedo(self._geometry(points).features, points=points)


def depth_image(depth: Tensor, opacity: Tensor) -> Tensor:
    """(B, H, W, 1) in [0, 1]: near is bright, the range is that of the opaque pixels, nothing is black."""
    seen = opacity > 0.5
    if not bool(seen.any()):
        return torch.zeros_like(depth)
    near, far = depth[seen].min(), depth[seen].max()
    shade = 1.0 - 0.8 * (depth - near) / (far - near).clamp_min(1e-6)
    return torch.where(seen, shade, torch.zeros_like(shade))
