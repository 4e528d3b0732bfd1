"""Target images that are kept for several steps, one for each view: iterative dataset update (arXiv 2303.12789)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.cameras import Cameras

ViewKey = tuple[int, tuple[float, ...]]
"""A particle and the camera-to-world matrix from which it is seen."""


@dataclass(frozen=True)
class StoredTarget:
    """The target of one view.

    Attributes:
        image: (H, W, 3), target image in [0, 1].
        background: (H, W, 3), background of the render from which it was made.
        surface: (H, W, K), further maps that were computed from the image, of any number of channels.
        fovy: Vertical field of view of the camera in radians; NaN if a checkpoint of an earlier version lacks it.
    """

    image: Tensor
    background: Tensor
    surface: Tensor
    fovy: float


class StoredTargets(nn.Module):
    """Targets of views, which become outdated every ``every`` steps; they are part of checkpoints.

    Args:
        every: Number of steps after which all targets are outdated. A target is replaced when its view is shown next.
        channels: Number of channels K of the further maps; a target with another number is outdated.
    """

    def __init__(self, every: int, channels: int = 0) -> None:
        super().__init__()
        self.every, self.channels = every, channels
        self._round = 0
        self._targets: dict[ViewKey, StoredTarget] = {}

    @staticmethod
    def keys(particles: Sequence[int], cameras: Cameras) -> list[ViewKey]:
        """The key of each of the B items, in one copy from the device."""
        poses = cameras.c2w.flatten(1).tolist()
        return [(particle, tuple(pose)) for particle, pose in zip(particles, poses, strict=True)]

    def outdated(self, keys: Sequence[ViewKey], step: int) -> bool:
        """Whether the target of any key is missing, lacks maps, or is from another round than that of ``step``."""
        return step // self.every != self._round or not all(self._has(key) for key in keys)

    def _has(self, key: ViewKey) -> bool:
        return key in self._targets and self._targets[key].surface.shape[-1] == self.channels

    def put(
        self,
        particles: Sequence[int],
        cameras: Cameras,
        step: int,
        images: Tensor,
        backgrounds: Tensor,
        surfaces: Tensor | None = None,
    ) -> None:
        """Store targets and backgrounds, (B, H, W, 3) each, and further maps (B, H, W, K).

        The targets of other rounds and those with other shapes are dropped.
        """
        surfaces = images[..., :0] if surfaces is None else surfaces
        shapes = [maps.shape[1:] for maps in (images, backgrounds, surfaces)]
        alike = all(
            [item.image.shape, item.background.shape, item.surface.shape] == shapes for item in self._targets.values()
        )
        if step // self.every != self._round or not alike:
            self._round, self._targets = step // self.every, {}
        keys, fovys = self.keys(particles, cameras), cameras.fovy.tolist()
        for key, image, background, surface, fovy in zip(keys, images, backgrounds, surfaces, fovys, strict=True):
            self._targets[key] = StoredTarget(image, background, surface, fovy)

    def get(self, keys: Sequence[ViewKey]) -> tuple[Tensor, Tensor, Tensor]:
        """Targets and backgrounds of the keys, (B, H, W, 3) each, and their further maps (B, H, W, K)."""
        found = [self._targets[key] for key in keys]
        images, backgrounds, surfaces = (
            torch.stack([getattr(item, name) for item in found]) for name in ("image", "background", "surface")
        )
        return images, backgrounds, surfaces

    def maps(self, particle: int) -> tuple[Cameras, Tensor] | None:
        """Cameras of the B targets of a particle and their further maps (B, H, W, K); None if B is 0."""
        found = [
            (pose, target)
            for (owner, pose), target in self._targets.items()
            if owner == particle and target.surface.shape[-1] == self.channels and math.isfinite(target.fovy)
        ]
        if not found:
            return None
        maps = torch.stack([target.surface for _, target in found])
        c2w = maps.new_tensor([pose for pose, _ in found], dtype=torch.float32).view(-1, 4, 4)
        fovy = c2w.new_tensor([target.fovy for _, target in found])
        return Cameras.from_poses(c2w, fovy, maps.shape[1], maps.shape[2]), maps

    def get_extra_state(self) -> dict[str, Any]:
        """All targets as tensors and numbers; empty without targets."""
        if not self._targets:
            return {}
        items = list(self._targets.values())
        return {
            "particles": [particle for particle, _ in self._targets],
            "poses": [list(pose) for _, pose in self._targets],
            "round": self._round,
            "images": torch.stack([item.image for item in items]),
            "backgrounds": torch.stack([item.background for item in items]),
            "surfaces": torch.stack([item.surface for item in items]),
            "fovys": [item.fovy for item in items],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Replace all targets by those that :meth:`get_extra_state` returned."""
        names = ("particles", "poses", "images", "backgrounds", "surfaces", "fovys")
        if state:  # checkpoints of earlier versions lack some of the names
            state = {"surfaces": state["images"][..., :0], "fovys": [math.nan] * len(state["poses"])} | state
        rows = zip(*(state.get(name, ()) for name in names), strict=True)
        self._round = state.get("round", 0)
        self._targets = {(particle, tuple(pose)): StoredTarget(*maps) for particle, pose, *maps in rows}
