"""Text to 3D: render views of a scene, or of several, and let the prior judge them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, Schedule, component, component_map, option, under
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.base import Geometry
from scoredist3d.losses.base import Loss
from scoredist3d.registry import register
from scoredist3d.renderers.base import NOTHING, Render
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import GuidedSystem, TrainingStep
from scoredist3d.systems.conversion import ConversionConfig, convert, means_the_same
from scoredist3d.systems.scene import Scene, SceneShape, merged_groups

if TYPE_CHECKING:
    from scoredist3d.config.experiment import PreviewConfig, TurntableConfig


_log = logging.getLogger(__name__)


@register("system", "text-to-3d", summary="Optimise a scene so that its rendered views look like the prompt.")
class TextTo3D(GuidedSystem):
    """Cameras -> renderer -> prior.encode -> guidance, plus weighted regularisers.

    With ``particles`` above 1 the run optimises that many scenes at once; each step draws some of them, and the
    guidance is told which. Methods that edit see the scene as it was at the start through the same cameras.
    """

    @dataclass
    class Config(GuidedSystem.Config):
        """Blocks of the representation and the regularisers."""

        geometry: ComponentConfig = component("geometry", "implicit-volume", "Density and features of the object.")
        material: ComponentConfig = component("material", "no-material", "From features to colour.")
        background: ComponentConfig = component("background", "random", "What is behind the object.")
        renderer: ComponentConfig = component("renderer", "volume", "From scene and cameras to images.")
        loss: dict[str, ComponentConfig] = component_map("loss", "Regularisers and their weights.")
        particles: int = option(1, "Scenes optimised in one run, from different starting values.", ge=1)
        particles_per_step: int = option(
            1, "Scenes drawn in each step without replacement, all seen from the step's cameras.", ge=1
        )
        init_from: str | None = option(
            None, "Run folder or checkpoint whose scene to start from; another representation is converted."
        )
        conversion: ConversionConfig = field(
            default_factory=ConversionConfig, metadata={"help": "How a scene of another representation is taken over."}
        )

        def validate(self) -> list[str]:
            """A canvas has no density to render; edits need something to edit."""
            problems = super().validate()
            if self.geometry is not None and self.geometry.type == "image-canvas":
                problems.append(
                    "geometry.type: image-canvas cannot be rendered from cameras; use system.type=text-to-2d"
                )
            elif self.geometry is not None and self.renderer is not None:
                shown: Any = registry.entry_of(self.renderer).cls
                if not issubclass(registry.entry_of(self.geometry).cls, shown.supports):
                    problems.append(
                        f"renderer.type: {self.renderer.type} cannot render {self.geometry.type}; "
                        f"use {_renderers_of(self.geometry)}"
                    )
                else:
                    problems.extend(self._unfit_losses(shown))
            if self.particles_per_step > self.particles:
                problems.append(
                    f"particles_per_step: {self.particles_per_step} exceeds particles, which is {self.particles}"
                )
            if self.guidance is not None and not self.init_from:
                method: Any = registry.entry_of(self.guidance).cls
                if method.needs_source:
                    problems.append(f"init_from: {self.guidance.type} edits a scene; give the run folder that made it")
            return problems

        def _unfit_losses(self, renderer: Any) -> list[str]:
            """Terms that the geometry or the renderer has nothing for; those of weight 0 are let be."""
            problems = []
            for name, block in self.loss.items():
                term: Any = registry.entry_of(block).cls
                if block.weight == Schedule.constant(0.0):  # type: ignore[attr-defined]
                    continue
                if not issubclass(registry.entry_of(self.geometry).cls, term.applies_to):
                    problems.append(
                        f"loss.{name}: the term is for a {term.applies_to.__name__}, which {self.geometry.type} "
                        f"is not; set system.loss.{name}=null"
                    )
                for lacking in sorted(term.needs - renderer.outputs):
                    problems.append(
                        f"loss.{name}: the term needs {lacking}, which the renderer {self.renderer.type} does not "
                        f"make; set system.loss.{name}=null"
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
        self.settings = config
        self.cameras = (
            registry.build(parse_component("data", {"type": "random-camera"})) if cameras is None else cameras
        )
        rng = (rng or Rng()).shared()
        self._seed = rng.seed
        streams = [rng, *(rng.derive(f"particle/{index}") for index in range(1, config.particles))]
        self.scenes = nn.ModuleList(self._scene(config, stream) for stream in streams)
        self.losses = {name: registry.build(block) for name, block in config.loss.items()}
        self.source = self._frozen_copy() if self.guidance.needs_source else None

    @property
    def geometry(self) -> Geometry:
        """Of the first scene."""
        return self.scenes[0].geometry  # type: ignore[return-value]

    @property
    def makes_latents(self) -> bool:
        """Whether renders are latents."""
        material: Any = self.scenes[0].material
        return bool(material.makes_latents)

    @property
    def steps_everything(self) -> bool:
        """Scenes that a step does not draw get no gradient."""
        return self.settings.particles_per_step == len(self.scenes)

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """Loss of one batch of views."""
        losses = {name: loss for name, loss in self.losses.items() if loss.weight(step) != 0.0}
        drawn = self._draw(step, rng.shared())
        cameras = self.cameras.sample(step, rng).to(self.device)
        needs = NOTHING.union(*(loss.needs for loss in losses.values()))
        renders = [self._render(self.scenes[index], cameras, rng, needs) for index in drawn]
        rgb, opacity = (torch.cat([getattr(render, name) for render in renders]) for name in ("rgb", "opacity"))
        latents = self._latents(rgb, step, rng)
        guided = self.guide(
            latents,
            self.prompts(Cameras.cat([cameras] * len(drawn))),
            step,
            rng,
            rgb=None if self.makes_latents else rgb,
            opacity=opacity,
            particles=[index for index in drawn for _ in range(len(cameras))],
            source=self._source_latents(cameras, step, rng, len(drawn)),
        )
        total, terms = self._regularised(guided.loss, losses, dict(zip(drawn, renders, strict=True)), step, rng)
        return TrainingStep(total, guided.scalars | terms | {"opacity": opacity.detach().mean()})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``geometry.*``, ``material``, ``background`` and ``renderer`` groups, each over all scenes."""
        return merged_groups([group for scene in self.scenes for group in scene.parameter_groups()])  # type: ignore[operator]

    def init_from(self, state: Mapping[str, Any], system: Any = None) -> None:
        """Take over the first scene of another run, in every scene.

        Args:
            state: That run's ``state_dict``.
            system: Its ``system`` block; where not given, the representation must be the same.

        Raises:
            ValueError: The state holds no such scene, or one that cannot be converted.
        """
        prefix = "scenes.0."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        first: Any = self.scenes[0]
        alike = system is None or all(
            means_the_same(getattr(self.settings, name), getattr(system, name, None))
            for name in ("geometry", "material", "background")
        )
        if alike and first.fits(weights):
            copies = weights
        else:
            if not weights:
                raise ValueError("system.init_from: that run made images, not a scene; give a run of text-to-3d")
            if system is None:
                raise ValueError("system.init_from: the scene there is represented otherwise; give its system block")
            source = self._scene(system, Rng())
            source.load_state_dict(weights)
            source.to(self.device)
            for line in convert(source, first, self.settings.conversion, Rng(self._seed)):
                _log.info("%s", line)
            copies = first.state_dict()
        for scene in [*self.scenes, *([] if self.source is None else [self.source])]:
            scene.continue_from(copies)  # type: ignore[operator]

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Levels and occupancy."""
        for index, scene in enumerate(self.scenes):
            scene.prepare_step(step, rng.derive(f"particle/{index}") if index else rng)  # type: ignore[operator]

    def restore_step(self, step: int) -> None:
        """Levels as after ``step`` optimiser steps; the occupancy grids are in the checkpoint."""
        for scene in self.scenes:
            scene.restore_step(step)  # type: ignore[operator]

    def preview(self, config: PreviewConfig) -> dict[str, Tensor]:
        """Colour, opacity and depth (near is bright) of views around the first object, and colour of the others."""
        renders = list(self._views(0, config.azimuths, config.elevation, config.size, config.size))
        opacity = torch.cat([render.opacity for render in renders])
        depth = torch.cat([render.depth for render in renders])
        rows = {
            "rgb": torch.cat([render.rgb for render in renders]),
            "opacity": opacity.expand(*opacity.shape[:-1], 3),
            "depth": depth_image(depth, opacity).expand(*depth.shape[:-1], 3),
        }
        for index in range(1, len(self.scenes)):
            views = self._views(index, config.azimuths, config.elevation, config.size, config.size)
            rows[f"rgb {index + 1}"] = torch.cat([render.rgb for render in views])
        return rows

    def frames(self, config: TurntableConfig, snapshots: Sequence[Path]) -> Iterator[Tensor]:
        """One turn around the objects, side by side."""
        turns = [
            self._views(index, _turn(config), config.elevation, config.height, config.width)
            for index in range(len(self.scenes))
        ]
        for renders in zip(*turns, strict=True):
            yield torch.cat([render.rgb[0] for render in renders], dim=1)

    def video_cameras(self, config: TurntableConfig) -> Cameras:
        """Of the turn around each object."""
        cameras: Cameras = self.cameras.evaluation(_turn(config), config.elevation, config.height, config.width)
        return cameras

    def after_step(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """What geometries do between two updates."""
        for index, scene in enumerate(self.scenes):
            stream = rng.derive(f"particle/{index}") if index else rng
            with under("geometry"):
                scene.geometry.after_step(step, optimizer, stream)  # type: ignore[operator, union-attr]

    @property
    def grows(self) -> bool:
        """Whether parameters may change their sizes."""
        return self.geometry.grows

    def shapes(self) -> list[SceneShape]:
        """Every scene, for exporters."""
        return [SceneShape(scene) for scene in self.scenes]  # type: ignore[arg-type]

    def _scene(self, config: Any, rng: Rng) -> Scene:
        """A fresh scene of a system block."""
        parts = (config.geometry, config.material, config.background, config.renderer)
        return Scene(*parts, rng=rng, prior=self.prior)

    @torch.no_grad()
    def _views(
        self, scene: int, azimuths: Sequence[float], elevation: float, height: int, width: int
    ) -> Iterator[Render]:
        """Renders from one camera each, at the evaluation distance and field of view of the camera block."""
        cameras = self.cameras.evaluation(azimuths, elevation, height, width)
        shown: Any = self.scenes[scene]
        for index in range(len(cameras)):
            render = shown(cameras[index].to(self.device), step=shown.step, rng=None)
            yield replace(render, rgb=shown.material.display(render.rgb))

    def _draw(self, step: int, rng: Rng) -> list[int]:
        """The scenes of this step, the same on every rank."""
        count = self.settings.particles_per_step
        if self.steps_everything:
            return list(range(count))
        drawn: list[int] = torch.randperm(len(self.scenes), generator=rng("particles", step))[:count].tolist()
        return drawn

    def _frozen_copy(self) -> nn.Module:
        return copy.deepcopy(self.scenes[0]).requires_grad_(False)

    def _render(self, scene: Any, cameras: Cameras, rng: Rng, needs: Set[str] = NOTHING) -> Render:
        """A training view; schedules of a scene that another run began go on where that one ended."""
        render: Render = scene(cameras, step=self.scenes[0].step, rng=rng, needs=needs)
        return render

    @torch.no_grad()
    def _source_latents(self, cameras: Cameras, step: int, rng: Rng, count: int) -> Tensor | None:
        """Latents of the scene as it was at the start, over the same backgrounds, ``count`` times."""
        if self.source is None:
            return None
        rgb = self._render(self.source, cameras, rng).rgb
        return self._latents(torch.cat([rgb] * count), step, rng)

    def _latents(self, rgb: Tensor, step: int, rng: Rng) -> Tensor:
        """(B, C, h, w) of renders, which are images that the prior encodes, or latents already."""
        if not self.makes_latents:
            return self.prior.encode(rgb, rng("encode", step, self.device))
        size = self.prior.latent_shape(self.prior.image_size, self.prior.image_size)[1:]
        latents = rgb.movedim(-1, 1)
        if latents.shape[2:] == size:
            return latents
        return functional.interpolate(latents, size, mode="bilinear", align_corners=False, antialias=True)

    def _regularised(
        self, guided: Tensor, losses: dict[str, Loss], renders: dict[int, Render], step: int, rng: Rng
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Guidance's loss, the renderers' own and the weighted terms (means over the drawn scenes).

        Each term is logged raw and weighted.
        """
        total = guided
        scalars: dict[str, Tensor | float] = {}
        for name in next(iter(renders.values())).auxiliary:
            value = torch.stack([render.auxiliary[name] for render in renders.values()]).mean()
            total = total + value
            scalars[f"loss/{name}"] = value.detach()
        for name, loss in losses.items():
            values = [loss(render, self.scenes[index].geometry, step, rng) for index, render in renders.items()]  # type: ignore[arg-type]
            value = torch.stack(values).mean()
            weighted = loss.weight(step) * value
            total = total + weighted
            scalars[f"loss/{name}"] = value.detach()
            scalars[f"weighted/{name}"] = weighted.detach()
        return total, scalars


def _turn(config: TurntableConfig) -> list[float]:
    """Degrees of azimuth, one per frame."""
    return [360.0 * index / config.frames for index in range(config.frames)]


def _renderers_of(geometry: ComponentConfig) -> str:
    """Names of the renderers that can show a geometry."""
    cls = registry.entry_of(geometry).cls
    found = [name for name in registry.names("renderer") if issubclass(cls, _renders(name))]
    return " or ".join(found) or "another geometry"


def _renders(name: str) -> type:
    renderer: Any = registry.lookup("renderer", name).cls
    kind: type = renderer.supports
    return kind


def depth_image(depth: Tensor, opacity: Tensor) -> Tensor:
    """(B, H, W, 1) in [0, 1]: near is bright, the range is that of the opaque pixels, nothing is black."""
    seen = opacity > 0.5
    if not bool(seen.any()):
        return torch.zeros_like(depth)
    near, far = depth[seen].min(), depth[seen].max()
    shade = 1.0 - 0.8 * (depth - near) / (far - near).clamp_min(1e-6)
    return torch.where(seen, shade, torch.zeros_like(shade))
