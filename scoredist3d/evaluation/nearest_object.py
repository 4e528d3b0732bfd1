"""The procedural object that is nearest to a surface: a random search over its family, then refinement of the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.procedural import SIZES, Objects, cast_rays
from scoredist3d.procedural.members import ObjectFamily, Proportions

_CAP = 0.25  # difference of depths that counts as a miss, scene units; about three times the tolerance of the exporter
_MARGIN = 8  # pixels around the silhouettes in which rays are compared
_SPREAD = (0.25, 0.02)  # standard deviation of the changes in the first and in the last round, of the range
_P_CHANGED, _P_OTHER_KIND = 0.5, 0.05  # probability that a child differs in a proportion, and in its mode or size
_CPU_CHUNK, _GPU_CHUNK = 1 << 14, 1 << 21  # rays; temporaries stay in the cache of a CPU; launches limit a GPU


@dataclass(frozen=True)
class Effort:
    """How long the search takes.

    Attributes:
        candidates: Random members, compared along a quarter of the rays.
        rounds: Rounds of refinement.
        children: Members that are tried in each round.
        parents: Members that each round keeps.
        rays: Rays of the refinement. The parents of the last round are compared along 8 times as many.
    """

    candidates: int = 768
    rounds: int = 24
    children: int = 48
    parents: int = 8
    rays: int = 1536


DEFAULT_EFFORT = Effort()


@dataclass(frozen=True)
class NearestObject:
    """The member of a family that is nearest to a surface.

    Attributes:
        member: The member, a batch of one.
        difference: Mean difference of the depths along the compared rays, in [0, 1]: 1 where only one of the two is hit
            or where the depths differ by 0.25 or more.
    """

    member: Objects
    difference: float


@torch.no_grad()
def nearest_object(
    opacity: Tensor,
    depth: Tensor,
    cameras: Cameras,
    category: str,
    look: Mapping[str, int],
    *,
    effort: Effort = DEFAULT_EFFORT,
    generator: torch.Generator | None = None,
) -> NearestObject:
    """The member of a family whose depths are the most similar to those of a surface.

    Random members come first. The best of each structural variant are the parents of the first round. In each round,
    their children differ in some of the proportions by normal random changes, which shrink from round to round, and the
    best of parents and children of each variant are the next parents. The surface itself is neither moved nor scaled.

    Args:
        opacity: (V, H, W), opacity of the surface in each view. Partly covered pixels are not compared.
        depth: (V, H, W), distances from the camera, scene units.
        cameras: The V cameras.
        category: Name of the family.
        look: Colors, pattern and finish of the members, as in :func:`~scoredist3d.procedural.sample_objects`.
        effort: How long the search takes.
        generator: Source of randomness; by default one on the CPU with a fixed seed, for the same draws on any device.

    Raises:
        ValueError: No family has this name, or no pixel is covered.
    """
    generator = generator or torch.Generator().manual_seed(0)
    search = _Search(ObjectFamily(category, look, opacity.device), generator)
    every = _DepthRays.of(opacity, depth, cameras, 8 * effort.rays, generator)
    some = every.first(effort.rays)
    kept = search.random(effort.candidates)
    scores = every.first(effort.rays // 4).differences(search.family.build(kept))
    kept = kept[_fittest(scores, kept.mode, 4 * effort.parents)]
    scores = some.differences(search.family.build(kept))
    widest, narrowest = _SPREAD
    for index in range(effort.rounds):
        order = _fittest(scores, kept.mode, effort.parents)
        spread = widest * (narrowest / widest) ** (index / max(effort.rounds - 1, 1))
        born = search.children(kept[order], effort.children, spread)
        kept = Proportions.cat([kept[order], born])
        scores = torch.cat([scores[order], some.differences(search.family.build(born))])
    kept = kept[_fittest(scores, kept.mode, effort.parents)]
    members = search.family.build(kept)
    scores = every.differences(members)
    best = int(scores.argmin())
    return NearestObject(members[best], float(scores[best]))


@dataclass(frozen=True)
class _DepthRays:
    """``R`` rays and the depth of a surface along them, infinity for a miss."""

    origins: Tensor
    directions: Tensor
    depth: Tensor

    @classmethod
    def of(cls, opacity: Tensor, depth: Tensor, cameras: Cameras, count: int, generator: torch.Generator) -> _DepthRays:
        """At most ``count`` random rays through pixels in and around the silhouettes, covered or empty as a whole.

        Raises:
            ValueError: No pixel is covered.
        """
        solid = opacity > 0.99
        if not bool(solid.any()):
            raise ValueError("opacity: no pixel is covered, so there is no surface to compare; use more or other views")
        near = torch.nn.functional.max_pool2d(solid[:, None].float(), 2 * _MARGIN + 1, 1, _MARGIN)[:, 0] > 0
        pixels = (near & (solid | (opacity < 0.01))).flatten().nonzero()[:, 0]
        order = torch.randperm(len(pixels), generator=generator, device=generator.device)
        pixels = pixels[order[:count].to(pixels.device)]
        rays = cameras.rays()
        origins = rays.origins.expand_as(rays.directions)
        depths = torch.where(solid, depth, torch.inf).flatten()
        return cls(origins.reshape(-1, 3)[pixels], rays.directions.reshape(-1, 3)[pixels], depths[pixels])

    def first(self, count: int) -> _DepthRays:
        """The first ``count`` rays."""
        return _DepthRays(self.origins[:count], self.directions[:count], self.depth[:count])

    def differences(self, objects: Objects) -> Tensor:
        """Mean difference of each of N objects along the rays that hit it or the surface, (N,)."""
        geometry = objects.trimmed().geometry
        step = max(1, (_CPU_CHUNK if self.depth.device.type == "cpu" else _GPU_CHUNK) // len(self.depth))
        found = []
        for part in geometry.split(step):
            shape = (len(part), -1, -1)
            depth = cast_rays(part, self.origins.expand(shape), self.directions.expand(shape)).t
            hit = depth.isfinite() | self.depth.isfinite()
            # Two misses give NaN, which ``hit`` leaves out.
            apart = ((depth - self.depth).abs() / _CAP).nan_to_num(0.0, posinf=1.0).clamp_max(1.0)
            found.append((apart * hit).sum(1) / hit.sum(1).clamp_min(1))
        return torch.cat(found)


@dataclass(frozen=True)
class _Search:
    """Random members of a family and random changes of members."""

    family: ObjectFamily
    generator: torch.Generator

    def uniform(self, *shape: int) -> Tensor:
        """Uniform random numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator, device=self.generator.device).to(self.family.device)

    def random(self, count: int) -> Proportions:
        """Members with independent uniform proportions, modes and sizes."""
        mode = (self.uniform(count) * self.family.modes).long()
        size = (self.uniform(count) * len(SIZES)).long()
        return Proportions(mode, size, self.uniform(count, self.family.dimensions))

    def children(self, parents: Proportions, count: int, spread: float) -> Proportions:
        """Randomly changed copies of random parents."""
        copies = parents[(self.uniform(count) * len(parents)).long()]
        noise = torch.randn(copies.values.shape, generator=self.generator, device=self.generator.device)
        changes = spread * noise.to(self.family.device) * (self.uniform(*copies.values.shape) < _P_CHANGED)
        other = self.random(count)
        mode = torch.where(self.uniform(count) < _P_OTHER_KIND, other.mode, copies.mode)
        size = torch.where(self.uniform(count) < _P_OTHER_KIND, other.size, copies.size)
        return Proportions(mode, size, (copies.values + changes).clamp(0.0, 1.0))


def _fittest(scores: Tensor, mode: Tensor, count: int) -> Tensor:
    """Indices of about ``count`` members with the lowest scores (N,), the same number of each mode.

    Modes differ in small parts such as handles, so each is refined before the best one is chosen.
    """
    modes = mode.unique()
    order = scores.argsort()
    return torch.cat([order[mode[order] == value][: -(-count // len(modes))] for value in modes])
