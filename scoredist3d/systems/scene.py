"""A 3D scene: geometry, material, background and the renderer that draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d import registry
from scoredist3d.backgrounds.base import Background
from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, under
from scoredist3d.data.base import CameraSampler
from scoredist3d.geometry.base import Field, Geometry, fits
from scoredist3d.geometry.protocols import HasCarving, HasGaussians, HasSurface
from scoredist3d.materials.base import Material, ShadingInputs
from scoredist3d.meshes.exportable import ObjectViews, SurfaceChannels
from scoredist3d.meshes.mesh import Mesh
from scoredist3d.meshes.space_carving import DepthEstimates
from scoredist3d.meshes.splats import Splats
from scoredist3d.nn.ranks import sum_over_ranks
from scoredist3d.priors.base import Prior
from scoredist3d.renderers.base import Render, Renderer
from scoredist3d.seeding import Rng
from scoredist3d.systems.base import named_groups
from scoredist3d.systems.clock import Clock
from scoredist3d.systems.fused_surface import DepthViews, FusedSurface, fused_surface
from scoredist3d.systems.object_views import object_views
from scoredist3d.systems.volume_channels import volume_channels

PARTS = ("geometry", "material", "background", "renderer")


class Scene(nn.Module):
    """A 3D scene: geometry, material, background and renderer, built from their config blocks.

    Attributes:
        blocks: The configs of the parts, by name.
        clock: The current step; see :class:`~scoredist3d.systems.clock.Clock`. The buffer ``steps`` (scene step,
            offset) saves it with the weights.
    """

    steps: Tensor

    def __init__(
        self,
        geometry: ComponentConfig,
        material: ComponentConfig,
        background: ComponentConfig,
        renderer: ComponentConfig,
        *,
        rng: Rng,
        prior: Prior | None = None,
    ) -> None:
        """Args:
        geometry, material, background, renderer: Config blocks of the parts.
        rng: Random streams of the initial parameters; the same on all ranks.
        prior: Diffusion model, needed by materials that produce its latents.
        """
        super().__init__()
        self.blocks = dict(zip(PARTS, (geometry, material, background, renderer), strict=True))
        self.material: Material = self._build("material", rng=rng, prior=prior)
        self.geometry: Geometry = self._build("geometry", rng=rng, material=self.material)
        self.background: Background = self._build("background", rng=rng, num_channels=self.material.num_channels)
        parts = {"geometry": self.geometry, "material": self.material, "background": self.background}
        self.renderer: Renderer = self._build("renderer", rng=rng, **parts)
        self.clock = Clock()
        self.register_buffer("steps", torch.zeros(2, dtype=torch.long))
        self.register_load_state_dict_post_hook(_restore_clock)

    def _build(self, name: str, **runtime: Any) -> Any:
        """Build one part; errors name the config key that the user can set."""
        with under(name, claim=True):
            return registry.build(self.blocks[name], **runtime)

    @property
    def step(self) -> int:
        """Current scene step, ``clock.scene_step``, which evaluation renders use as well."""
        return self.clock.scene_step

    @property
    def densifies(self) -> bool:
        """Whether parameters may change in size during training."""
        return self.geometry.densifies

    def forward(self, cameras: Cameras, *, step: int, rng: Rng | None, needs: Set[str] = frozenset()) -> Render:
        """Render the scene at a scene step; see :class:`~scoredist3d.renderers.base.Renderer`."""
        render: Render = self.renderer(cameras, step=step, rng=rng, needs=needs)
        return render

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups ``geometry.*``, ``material``, ``background`` and ``renderer`` of parts with parameters."""
        return [group for name in PARTS for group in named_groups(name, getattr(self, name))]

    def prepare_step(self, step: int, rng: Rng) -> None:
        """Set the active grid levels and the occupancy grid before step ``step`` of the run."""
        self._set_clock(self.clock.at(step))
        self.renderer.update_step(self.clock.scene_step, rng)

    def pre_backward(self, render: Render) -> None:
        """Prepare densification for the backward pass through a training render."""
        if self.geometry.densification is not None and render.projection is not None:
            self.geometry.densification.step_pre_backward(render.projection)

    def post_backward(self, step: int, optimizer: torch.optim.Optimizer, rng: Rng) -> None:
        """Densify the geometry after the optimizer's update of step ``step`` of the run.

        Args:
            step: Run step.
            optimizer: Optimizer whose per-parameter state is resized along with the parameters.
            rng: Random streams, the same on all ranks.
        """
        if self.geometry.densification is not None:
            with under("geometry"):
                self.geometry.densification.step_post_backward(step, optimizer, rng)

    def carve(self, views: DepthEstimates | None) -> int:
        """Remove the geometry's matter through which views see, those of all ranks together.

        Args:
            views: Views that this rank knows; None if it knows none.

        Returns:
            Number of points of the geometry's grid that are no longer inside.
        """
        geometry = self.geometry
        assert isinstance(geometry, HasCarving), "the config was validated"
        return geometry.carve(sum_over_ranks(geometry.carving_evidence(views)))

    def restore_step(self, step: int) -> None:
        """Set the active grid levels to those after ``step`` steps of the run; the occupancy grid is in the state."""
        self._set_clock(self.clock.at(step))
        self.geometry.update_step(self.clock.scene_step)
        self.material.update_step(self.clock.scene_step)

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether names and shapes in ``state`` match this scene; parameters of variable size are resized first."""
        return fits(self, state)

    def continue_from(self, state: dict[str, Any]) -> None:
        """Load another scene's ``state_dict`` and continue from its step."""
        self.load_state_dict(state)
        self.continue_at(self.clock.scene_step)

    def continue_at(self, scene_step: int) -> None:
        """Start a run at step 0 with a scene that has already been optimized for ``scene_step`` steps."""
        self.clock = Clock(offset=scene_step)
        self.restore_step(0)

    def _set_clock(self, clock: Clock) -> None:
        self.clock = clock
        self.steps[0].fill_(clock.scene_step)
        self.steps[1].fill_(clock.offset)


def _restore_clock(scene: Scene, _: object) -> None:
    scene_step, offset = scene.steps.tolist()
    scene.clock = Clock(scene_step - offset, offset)
    scene.geometry.update_step(scene_step)
    scene.material.update_step(scene_step)


class SceneShape:
    """The object of a scene as exporters and later stages see it: its surface and its unlit appearance."""

    def __init__(self, scene: Scene, cameras: CameraSampler | None = None) -> None:
        """Args:
        scene: The scene.
        cameras: Sampler of its training cameras; None if they are unknown.
        """
        self._scene, self._geometry, self._material = scene, scene.geometry, scene.material
        self._cameras = cameras

    @property
    def radius(self) -> float:
        """Radius of the ball that contains the object, in scene units."""
        return self._geometry.radius

    @property
    def device(self) -> torch.device:
        """Device of the parameters, on which query points must be."""
        return self._geometry.device

    @property
    def iso_level(self) -> float | None:
        """Density threshold that defines the surface; None if it has to be estimated."""
        return self._geometry.iso_level

    @property
    def baked_lighting(self) -> bool:
        """Whether the base color includes lighting."""
        return self._material.baked_lighting

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """(N,) densities at (N, 3) world points."""
        return self._geometry.density(points)

    @torch.no_grad()
    def channels(self, points: Tensor, normals: Tensor | None = None) -> SurfaceChannels:
        """Material channels at (N, 3) surface points; ``normals`` (N, 3) are the unit surface normals there.

        With normals, the channels of a radiance field are averages along rays against them; see
        :func:`~scoredist3d.systems.volume_channels.volume_channels`.
        """
        if normals is not None and isinstance(self._geometry, Field) and self._geometry.iso_level is None:
            return volume_channels(self._geometry, self._material, points, normals)
        return self._material.channels(ShadingInputs(self._geometry.features_at(points), points, normals))

    @torch.no_grad()
    def surface(self) -> Mesh | None:
        """The mesh of the geometry if it represents a surface, else None."""
        return self._geometry.surface() if isinstance(self._geometry, HasSurface) else None

    @torch.no_grad()
    def splats(self) -> Splats | None:
        """The Gaussians of the geometry if it consists of Gaussians, else None."""
        if not isinstance(self._geometry, HasGaussians):
            return None
        return self._geometry.splats(
            lambda features: self._material.channels(ShadingInputs(features)).base_color, self._material.harmonics
        )

    def views(self, cameras: Cameras) -> ObjectViews:
        """Images over white at the scene's current step; the cameras must be on :attr:`device`."""
        return object_views(self._scene.renderer, cameras, self._scene.step)

    def fused_surface(self, resolution: int) -> FusedSurface | None:
        """The surface that the depths of renders show; None if the object is too transparent."""
        return fused_surface(self._depths, self.radius, self.device, resolution)

    def _depths(self, cameras: Cameras) -> DepthViews:
        """Depths at the scene's current step, one camera at a time."""
        names = ("depth", "depth_variance", "opacity")
        step, needs = self._scene.step, frozenset({"depth_variance"})
        renders = [self._scene(cameras[index], step=step, rng=None, needs=needs) for index in range(len(cameras))]
        return DepthViews(*(torch.cat([render.get(name) for render in renders]) for name in names))

    def training_cameras(self, count: int) -> Cameras | None:
        """``count`` cameras on :attr:`device`, spread over the range of the training cameras; None if unknown."""
        return None if self._cameras is None else self._cameras.spread(count).to(self.device)


def merged_groups(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups in which those of equal name are merged into one, in the order of first appearance."""
    merged: dict[str, list[nn.Parameter]] = {}
    for group in groups:
        merged.setdefault(group["name"], []).extend(group["params"])
    return [{"name": name, "params": params} for name, params in merged.items()]
