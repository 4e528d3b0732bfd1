"""Text to 3D: optimize one scene, or several, so that rendered views match the prompt under the prior."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, Schedule, component, component_map, option
from scoredist3d.data.random_camera import RandomCamera
from scoredist3d.geometry.base import Geometry
from scoredist3d.geometry.protocols import HasCarving, describe_capability
from scoredist3d.limits import MAX_BATCH
from scoredist3d.reasons import part
from scoredist3d.registry import register
from scoredist3d.renderers.base import Render
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import GuidedSystem, SystemInputs, TrainingStep
from scoredist3d.systems.clock import Clock
from scoredist3d.systems.conversion import ConversionConfig, convert, weights_compatible
from scoredist3d.systems.modules import TypedModuleList
from scoredist3d.systems.objective import Objective
from scoredist3d.systems.scene import Scene, SceneShape, merged_groups

_log = logging.getLogger(__name__)


@register("system", "text-to-3d", summary="Optimize a 3D scene whose rendered views match the prompt.")
class TextTo3D(GuidedSystem):
    """Optimizes 3D scenes: cameras -> renderer -> prior.encode -> guidance, plus weighted regularizers.

    A run with several ``particles`` optimizes that many scenes; each step renders some of them, and the guidance
    receives their indices. Editing methods also receive renders of the initial scene from the same cameras.

    Attributes:
        scenes: The scenes, one per particle.
        cameras: Sampler of the training cameras; it also provides the evaluation cameras.
        objective: Renders the scenes and adds the regularizers.
        source: Frozen copy of the initial scene, for editing methods only.
    """

    @dataclass
    class Config(GuidedSystem.Config):
        """Options of the representation and the regularizers."""

        geometry: ComponentConfig = component("geometry", "implicit-volume", "Density and features of the object.")
        material: ComponentConfig = component("material", "unlit", "Turns features into color.")
        background: ComponentConfig = component("background", "random", "Color behind the object.")
        renderer: ComponentConfig = component("renderer", "volume", "Renders the scene from cameras.")
        loss: dict[str, ComponentConfig] = component_map("loss", "Regularizers and their weights.")
        particles: int = option(
            1, "Number of scenes optimized in one run, each with its own initialization.", ge=1, le=MAX_BATCH
        )
        particles_per_step: int = option(
            1,
            "Scenes rendered in each step, drawn without replacement; all are rendered from the same cameras.",
            ge=1,
            le=MAX_BATCH,
        )
        init_from: str | None = option(
            None,
            "Run folder or checkpoint whose scene initializes this one; a different representation is converted.",
        )
        conversion: ConversionConfig = field(
            default_factory=ConversionConfig, metadata={"help": "Conversion from another representation."}
        )

        def validate(self) -> list[str]:
            """Problems with the block: parts that do not fit together, or an editing method without a scene to edit."""
            problems = super().validate()
            if self.geometry is not None and self.geometry.type == "image-canvas":
                problems.append(
                    "geometry.type: image-canvas cannot be rendered from cameras; use system.type=text-to-2d"
                )
            elif self.geometry is not None and self.renderer is not None:
                renderer: Any = registry.entry_of(self.renderer).cls
                if not issubclass(registry.entry_of(self.geometry).cls, renderer.supports):
                    problems.append(
                        f"renderer.type: {self.renderer.type} cannot render {self.geometry.type}; "
                        f"use {_renderers_of(self.geometry)}"
                    )
                else:
                    problems.extend(self._unusable_losses(renderer))
                    problems.extend(self._lacking_maps(renderer))
                    problems.extend(self._uncarvable())
            if self.particles_per_step > self.particles:
                problems.append(
                    f"particles_per_step: {self.particles_per_step} exceeds particles, which is {self.particles}"
                )
            if self.guidance is not None and not self.init_from:
                method: Any = registry.entry_of(self.guidance).cls
                if method.needs_source:
                    problems.append(f"init_from: {self.guidance.type} edits a scene; give the run folder of that scene")
            return problems

        def _lacking_maps(self, renderer: Any) -> list[str]:
            """Problems with maps that the guidance reads and the renderer does not output."""
            guidance: Any = self.guidance
            maps: frozenset[str] = frozenset() if guidance is None else guidance.maps()
            return [
                f"guidance: {guidance.type} needs the map {name} with these weights, which the renderer "
                f"{self.renderer.type} does not output; choose another renderer or set the weights to 0"
                for name in sorted(maps - renderer.outputs)
            ]

        def _uncarvable(self) -> list[str]:
            """A problem if the guidance carves a geometry from which no matter can be removed."""
            guidance: Any = self.guidance
            if guidance is None or not guidance.carves:
                return []
            if not issubclass(registry.entry_of(self.geometry).cls, HasCarving):
                return [f"guidance.carve_steps: {self.geometry.type} has no signed distances on a grid; set it to []"]
            if getattr(self.geometry, "fix_geometry", False):
                return ["guidance.carve_steps: the surface is frozen; set it to [], or geometry.fix_geometry to false"]
            return []

        def _unusable_losses(self, renderer: Any) -> list[str]:
            """Problems with regularizers that the geometry or the renderer does not support; skips zero weights."""
            problems = []
            blocks: dict[str, Any] = self.loss
            for name, block in blocks.items():
                term: Any = registry.entry_of(block).cls
                if block.weight == Schedule.constant(0.0):
                    continue
                if not issubclass(registry.entry_of(self.geometry).cls, term.applies_to):
                    problems.append(
                        f"loss.{name}: the term needs {describe_capability(term.applies_to)}, which "
                        f"{self.geometry.type} is not; set system.loss.{name}=null"
                    )
                for lacking in sorted(term.needs - renderer.outputs):
                    problems.append(
                        f"loss.{name}: the term needs the map {lacking}, which the renderer {self.renderer.type} does "
                        f"not output; set system.loss.{name}=null"
                    )
            return problems

    config: Config

    def assemble(self, inputs: SystemInputs) -> None:
        """Build guidance, prompts, scenes and objective."""
        super().assemble(inputs)
        config, rng = self.config, inputs.rng.shared()
        self.cameras = RandomCamera(RandomCamera.Config()) if inputs.cameras is None else inputs.cameras
        self._seed = rng.seed
        streams = _streams(rng, config.particles)
        self.scenes: TypedModuleList[Scene] = TypedModuleList(self._scene(config, stream) for stream in streams)
        self.objective = Objective(config.loss)
        # Editing methods compare with the initial scene.
        self.source = copy.deepcopy(self.scenes[0]).requires_grad_(False) if self.guidance.needs_source else None

    @property
    def geometry(self) -> Geometry:
        """Geometry of the first scene."""
        return self.scenes[0].geometry

    @property
    def outputs_latents(self) -> bool:
        """Whether renders are latents of the prior instead of images."""
        return self.scenes[0].material.outputs_latents

    @property
    def steps_everything(self) -> bool:
        """Whether every step renders every scene; scenes that are not drawn get no gradient."""
        return self.config.particles_per_step == len(self.scenes)

    @property
    def densifies(self) -> bool:
        """Whether the geometry's parameters may change in size during training."""
        return self.scenes[0].densifies

    def training_step(self, step: int, rng: Rng) -> TrainingStep:
        """Loss of one batch of views of the scenes drawn for this step."""
        drawn = self._draw(step, rng.shared())
        cameras = self.cameras.sample(step, rng).to(self.device)
        scenes = [self.scenes[index] for index in drawn]
        data_term, clock = _Distillation(self, cameras, drawn), self.scenes[0].clock.at(step)
        return self.objective(scenes, cameras, data_term, clock, rng, needs=self.guidance.config.maps())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """``geometry.*``, ``material``, ``background`` and ``renderer`` groups, each over all scenes."""
        return merged_groups([group for scene in self.scenes for group in scene.parameter_groups()])

    def init_from(self, state: Mapping[str, Any], system: Any = None) -> None:
        """Initialize every scene with the first scene of another run.

        Args:
            state: The ``state_dict`` of that run.
            system: The ``system`` block of that run; without it, the representation must be the same.

        Raises:
            ValueError: ``state`` contains no scene, or the scene cannot be converted.
        """
        prefix = "scenes.0."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        first = self.scenes[0]
        alike = system is None or all(
            weights_compatible(getattr(self.config, name), getattr(system, name, None))
            for name in ("geometry", "material", "background")
        )
        if not (alike and first.fits(weights)):
            self._convert(weights, system)
            weights = first.state_dict()
        for scene in [*self.scenes, *([] if self.source is None else [self.source])]:
            scene.continue_from(weights)

    def _convert(self, weights: Mapping[str, Any], system: Any) -> None:
        """Convert the scene of another run, given by its weights and ``system`` block, into the first scene."""
        if not weights:
            raise ValueError("system.init_from: that run optimized images and has no scene; give a run of text-to-3d")
        if system is None:
            raise ValueError(
                "system.init_from: the scene of that run has another representation; pass its system block as well"
            )
        source = self._scene(system, Rng())
        if not source.fits(weights):
            raise ValueError(
                "system.init_from: the checkpoint of that run does not belong to its configs/resolved.yaml; restore "
                "one of the two, or name another run"
            )
        source.load_state_dict(dict(weights))
        source.to(self.device)
        for line in convert(source, self.scenes[0], self.config.conversion, Rng(self._seed)):
            _log.info("%s", line)

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Set the active grid levels and the occupancy grids of all scenes, and carve them by the guidance's depths."""
        for scene, stream in zip(self.scenes, _streams(rng, len(self.scenes)), strict=True):
            scene.prepare_step(step, stream)
        if self.guidance.carves_at(step):
            for index, scene in enumerate(self.scenes):
                removed = scene.carve(self.guidance.depth_estimates(index))
                _log.info("space carving before step %d removed %s grid points", step, f"{removed:,}")

    def post_backward(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """Densify every scene after the optimizer's update."""
        for scene, stream in zip(self.scenes, _streams(rng, len(self.scenes)), strict=True):
            scene.post_backward(step, optimizer, stream)

    def restore_step(self, step: int) -> None:
        """Set the active grid levels to those after ``step`` steps; the occupancy grids are in the checkpoint."""
        for scene in self.scenes:
            scene.restore_step(step)

    def list_scenes(self) -> list[Scene]:
        """All scenes, for previews and videos."""
        return list(self.scenes)

    def evaluation_cameras(self, azimuths: Sequence[float], elevation: float, height: int, width: int) -> Cameras:
        """Cameras around the object, angles in degrees; distance and field of view are those of the ``data`` block."""
        return self.cameras.evaluation(azimuths, elevation, height, width)

    def shapes(self) -> list[SceneShape]:
        """The object of every scene."""
        return [SceneShape(scene, self.cameras) for scene in self.scenes]

    def _scene(self, config: Any, rng: Rng) -> Scene:
        """A new scene from a system block."""
        parts = (config.geometry, config.material, config.background, config.renderer)
        return Scene(*parts, rng=rng, prior=self.prior)

    def _draw(self, step: int, rng: Rng) -> list[int]:
        """Indices of the scenes of this step, the same on every rank."""
        count = self.config.particles_per_step
        if self.steps_everything:
            return list(range(count))
        drawn: list[int] = torch.randperm(len(self.scenes), generator=rng("particles", step))[:count].tolist()
        return drawn


@dataclass(frozen=True)
class _Distillation:
    """Data term of one step: the guidance's loss on the latents of all renders.

    Attributes:
        system: System with the prior, the prompts, the guidance and the initial scene.
        cameras: (B) cameras from which every scene is rendered.
        drawn: Indices of the rendered scenes.
    """

    system: TextTo3D
    cameras: Cameras
    drawn: list[int]

    def __call__(self, renders: Sequence[Render], clock: Clock, rng: Rng) -> TrainingStep:
        """The guidance's loss and its values to log."""
        system, step = self.system, clock.run_step
        rgb = torch.cat([render.rgb for render in renders])
        opacity = torch.cat([render.opacity for render in renders])
        depth = torch.cat([render.depth for render in renders])
        cameras = Cameras.cat([self.cameras] * len(renders))
        particles = [index for index in self.drawn for _ in range(len(self.cameras))]
        reads = system.outputs_latents or system.guidance.reads_latents(step, cameras, particles)
        return system.guide(
            self._latents(rgb, step, rng) if reads else self._no_latents(rgb),
            system.prompts(cameras),
            step,
            rng,
            rgb=None if system.outputs_latents else rgb,
            opacity=opacity,
            depth=depth,
            particles=particles,
            source=self._source_latents(len(renders), clock, rng),
            background=torch.cat([render.background for render in renders]),
            normal=torch.cat([render.get("normal") for render in renders]) if self._reads_normals else None,
        )

    @property
    def _reads_normals(self) -> bool:
        return "normal" in self.system.guidance.config.maps()

    def _no_latents(self, rgb: Tensor) -> Tensor:
        """Zeros (B, C, h, w), for a step that does not read the latents of its renders (B, H, W, 3)."""
        prior = self.system.prior
        return rgb.new_zeros(len(rgb), *prior.latent_shape(prior.image_size, prior.image_size))

    @torch.no_grad()
    def _source_latents(self, count: int, clock: Clock, rng: Rng) -> Tensor | None:
        """Latents of the initial scene over the same backgrounds, repeated ``count`` times.

        None unless the guidance is an editing method.
        """
        source = self.system.source
        if source is None:
            return None
        rgb = source(self.cameras, step=clock.scene_step, rng=rng).rgb
        return self._latents(torch.cat([rgb] * count), clock.run_step, rng)

    def _latents(self, rgb: Tensor, step: int, rng: Rng) -> Tensor:
        """(B, C, h, w) latents of renders: images are encoded, latents are resized to the prior's size."""
        prior = self.system.prior
        if not self.system.outputs_latents:
            with part("the encoding of the render"):
                return prior.encode(rgb, rng("encode", step, self.system.device))
        size = prior.latent_shape(prior.image_size, prior.image_size)[1:]
        latents = rgb.movedim(-1, 1)
        if latents.shape[2:] == size:
            return latents
        return functional.interpolate(latents, size, mode="bilinear", align_corners=False, antialias=True)


def _streams(rng: Rng, count: int) -> list[Rng]:
    """Independent random streams of ``count`` scenes; the first is the stream of a run with a single scene."""
    return [rng.derive(f"particle/{index}") if index else rng for index in range(count)]


def _renderers_of(geometry: ComponentConfig) -> str:
    """Names of the renderers that support a geometry, joined by "or" for an error message."""
    cls = registry.entry_of(geometry).cls
    found = [name for name in registry.names("renderer") if issubclass(cls, _supported_by(name))]
    return " or ".join(found) or "another geometry"


def _supported_by(name: str) -> type:
    renderer: Any = registry.lookup("renderer", name).cls
    kind: type = renderer.supports
    return kind
