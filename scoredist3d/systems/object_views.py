"""Images of a scene's object over white, with and without lighting."""

from __future__ import annotations

import torch
from torch import Tensor

from scoredist3d.backgrounds.solid import Solid
from scoredist3d.cameras import Cameras
from scoredist3d.materials.base import Material, ShadingInputs
from scoredist3d.meshes.exportable import ObjectViews, SurfaceChannels
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.renderers.base import Render, Renderer


@torch.no_grad()
def object_views(renderer: Renderer, cameras: Cameras, step: int) -> ObjectViews:
    """Images of a renderer's object, one camera at a time and without randomness.

    Materials whose renders are lit are rendered a second time without lighting. For a material that outputs latents,
    both images show the base color.

    Args:
        renderer: Renderer of the object.
        cameras: (B), on the device of the geometry.
        step: Scene step.
    """
    material, white = renderer.material, Solid(Solid.Config())
    unlit = renderer.with_appearance(_BaseColor(material), white)
    has_light = material.needs_normal or material.sample_light(cameras, step, None) is not None
    lit = has_light and not material.baked_lighting and not material.outputs_latents
    shown = unlit if material.outputs_latents else renderer.with_appearance(material, white)
    first = _renders(shown, cameras, step)
    rgb = _joined(first, "rgb")
    return ObjectViews(
        rgb=rgb,
        base_color=_joined(_renders(unlit, cameras, step), "rgb") if lit else rgb,
        opacity=_joined(first, "opacity"),
        depth=_joined(first, "depth"),
        lit=lit,
    )


def _renders(renderer: Renderer, cameras: Cameras, step: int) -> list[Render]:
    return [renderer(cameras[index], step=step) for index in range(len(cameras))]


def _joined(renders: list[Render], name: str) -> Tensor:
    """(B, H, W, C): one map of all renders; colors are clipped to [0, 1]."""
    images = torch.cat([render.get(name) for render in renders])
    return images.clamp(0.0, 1.0) if name == "rgb" else images


class _BaseColor(Material):
    """The base color of another material, without lighting."""

    def __init__(self, material: Material) -> None:
        super().__init__(Material.Config())
        self.num_features = material.num_features
        self._material = Unregistered(material)

    def forward(self, inputs: ShadingInputs) -> Tensor:
        """(N, 3) base colors."""
        return self.channels(inputs).base_color

    def channels(self, inputs: ShadingInputs) -> SurfaceChannels:
        """The channels of the other material."""
        return self._material.value.channels(inputs)
