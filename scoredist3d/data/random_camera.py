"""Random cameras around the object."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config import option
from scoredist3d.data.base import CameraSampler
from scoredist3d.limits import MAX_BATCH, MAX_RENDER_SIDE, MAX_STEP_PIXELS, MAX_VIEWS
from scoredist3d.registry import register
from scoredist3d.seeding import Rng

Range = tuple[float, float]
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass
class EvaluationConfig:
    """Distance and field of view of evaluation views; ``preview`` and ``test`` set their angles and sizes."""

    distance: float = option(3.2, "Distance from the origin, scene units; relative_distance applies to it too.", gt=0)
    fovy: float = option(40.0, "Vertical field of view, degrees.", gt=0, lt=180)


@register(
    "data", "random-camera", summary="Random cameras around the object, evenly spaced in azimuth.", arxiv="2209.14988"
)
class RandomCamera(CameraSampler):
    """Cameras with azimuth, elevation, distance and field of view drawn from ranges, and optional jitter.

    With ``batch_uniform_azimuth``, the N views of a step over all ranks are at fractions (i + u) / N of the azimuth
    range, with one u ~ U(0, 1) per step, so each step covers the whole range. With probability ``area_probability``,
    the elevation is uniform over the area of the sphere (its sine is uniform); otherwise, it is uniform in the angle.
    """

    @dataclass
    class Config(CameraSampler.Config):
        """Options of the random cameras."""

        batch_size: int | list[int] = option(
            4, "Views per step and rank; a list has one value per stage of resolution_milestones.", ge=1, le=MAX_BATCH
        )
        height: int | list[int] = option(
            64, "Image height in pixels; a list has one value per stage.", ge=1, le=MAX_RENDER_SIDE
        )
        width: int | list[int] = option(
            64, "Image width in pixels; a list has one value per stage.", ge=1, le=MAX_RENDER_SIDE
        )
        resolution_milestones: list[int] = option([], "Optimizer steps at which the next stage begins.", ge=1)
        num_views: int | None = option(
            None,
            "Number of different cameras over all ranks, which are visited in turn; null draws new ones at every step.",
            ge=1,
            le=MAX_VIEWS,
        )
        azimuth_range: Range = option((-180.0, 180.0), "Azimuth in degrees; 0 is the front.", ge=-360, le=360)
        elevation_range: Range = option((-10.0, 60.0), "Elevation in degrees above the horizon.", ge=-90, le=90)
        distance_range: Range = option((3.04, 3.36), "Distance from the origin, scene units.", gt=0)
        fovy_range: Range = option((40.0, 40.0), "Vertical field of view, degrees.", gt=0, lt=180)
        relative_distance: bool = option(
            False,
            "Divide distances by tan(fovy / 2), so that the field of view does not change the size of the object.",
        )
        batch_uniform_azimuth: bool = option(True, "Space the views of a step evenly in azimuth.")
        area_probability: float = option(
            0.5, "Probability that the elevation is uniform in area instead of in angle.", ge=0, le=1
        )
        position_jitter: float = option(0.0, "Position noise U(-j, j) per axis, scene units.", ge=0)
        target_jitter: float = option(0.0, "Standard deviation of the noise on the target point, scene units.", ge=0)
        up_jitter: float = option(0.0, "Standard deviation of the noise on the up vector.", ge=0)
        evaluation: EvaluationConfig = field(
            default_factory=EvaluationConfig, metadata={"help": "Distance and field of view of evaluation views."}
        )

        def validate(self) -> list[str]:
            """Check that ranges are ordered and that lists have one value per stage."""
            problems = super().validate()
            for name in ("azimuth_range", "elevation_range", "distance_range", "fovy_range"):
                low, high = getattr(self, name)
                if low > high:
                    problems.append(f"{name}: the first value must not exceed the second, got [{low:g}, {high:g}]")
            milestones = self.resolution_milestones
            if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
                problems.append(f"resolution_milestones: must increase, got {milestones}; sort the steps")
            stages = len(milestones) + 1
            for name in ("batch_size", "height", "width"):
                values = getattr(self, name)
                if isinstance(values, list) and len(values) != stages:
                    problems.append(
                        f"{name}: needs {stages} values, one per stage of resolution_milestones, got {len(values)}"
                    )
            return problems or self._too_large(stages)

        def _too_large(self, stages: int) -> list[str]:
            """A message if the images of a step have too many pixels altogether."""
            sizes = (self.batch_size, self.height, self.width)
            pixels = max(math.prod(_at(values, stage) for values in sizes) for stage in range(stages))
            if pixels <= MAX_STEP_PIXELS:
                return []
            return [f"batch_size: {pixels:,} pixels per step are more than {MAX_STEP_PIXELS:,}; set a smaller value"]

    def __init__(self, config: Config, *, world_size: int = 1) -> None:
        super().__init__(config, world_size=world_size)
        self.config = config

    def sample(self, step: int, rng: Rng) -> Cameras:
        """The cameras of rank ``rng.rank`` at an optimizer step."""
        config = self.config
        stage = bisect.bisect_right(config.resolution_milestones, step)
        batch, height, width = (_at(values, stage) for values in (config.batch_size, config.height, config.width))
        if config.num_views is not None:
            first = (step * self.world_size + rng.rank) * batch
            index = (first + torch.arange(batch)) % config.num_views
            return self._views(config.num_views, rng.shared()("views", 0)).with_size(height, width)[index]
        generator = rng("cameras", step)
        azimuth = self._azimuth(batch, step, rng, generator)
        elevation = self._elevation(batch, generator)
        fovy = _uniform(config.fovy_range, batch, generator)
        distance = _uniform(config.distance_range, batch, generator)
        return orbit(
            azimuth,
            elevation,
            self._distance(distance, fovy),
            fovy,
            height,
            width,
            **self._jitter(batch, generator),
        )

    def _views(self, count: int, generator: torch.Generator) -> Cameras:
        """``count`` cameras from the same ranges as those of :meth:`sample`, evenly spaced in azimuth and elevation.

        The azimuths of consecutive cameras differ by the golden ratio times the range, so that each batch covers the
        whole range. The elevation range is divided into ``count`` parts, with one camera in each, in random order.
        """
        config = self.config
        offset = torch.rand(1, generator=generator)
        low, high = config.azimuth_range
        azimuth = low + (high - low) * ((torch.arange(count) + offset) * _GOLDEN % 1.0)
        u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        elevation = self._mixed_elevation(u, u, torch.rand(count, generator=generator))
        fovy = _uniform(config.fovy_range, count, generator)
        distance = self._distance(_uniform(config.distance_range, count, generator), fovy)
        return orbit(azimuth, elevation, distance, fovy, 1, 1, **self._jitter(count, generator))

    def evaluation(self, azimuths: Sequence[float], elevation: float, height: int, width: int) -> Cameras:
        """Cameras at the given angles and size, at the evaluation distance and field of view."""
        config = self.config.evaluation
        azimuth = torch.tensor([float(angle) for angle in azimuths])
        constant = torch.ones_like(azimuth)
        fovy = config.fovy * constant
        distance = self._distance(config.distance * constant, fovy)
        return orbit(azimuth, elevation * constant, distance, fovy, height, width)

    def _azimuth(self, batch: int, step: int, rng: Rng, generator: torch.Generator) -> Tensor:
        """(batch,) azimuths in degrees."""
        low, high = self.config.azimuth_range
        if not self.config.batch_uniform_azimuth:
            return _uniform(self.config.azimuth_range, batch, generator)
        offset = torch.rand(1, generator=rng.shared()("azimuth", step))
        # The views of the ranks interleave, so that each rank covers the whole range.
        index = torch.arange(batch) * self.world_size + rng.rank
        return low + (high - low) * (index + offset) / (batch * self.world_size)

    def _elevation(self, batch: int, generator: torch.Generator) -> Tensor:
        """(batch,) elevations in degrees."""
        angle, area, choice = (torch.rand(batch, generator=generator) for _ in range(3))
        return self._mixed_elevation(angle, area, choice)

    def _mixed_elevation(self, angle: Tensor, area: Tensor, choice: Tensor) -> Tensor:
        """Elevations (B,) in degrees at fractions (B,) in [0, 1] of the range of angles or of the area.

        The fraction of the area is used where ``choice`` (B,) is below ``area_probability``.
        """
        low, high = self.config.elevation_range
        bottom, top = math.sin(math.radians(low)), math.sin(math.radians(high))
        by_area = torch.rad2deg(torch.asin((bottom + (top - bottom) * area).clamp(-1.0, 1.0)))
        return torch.where(choice < self.config.area_probability, by_area, low + (high - low) * angle)

    def _distance(self, distance: Tensor, fovy_deg: Tensor) -> Tensor:
        """(B,) distances in scene units, with ``relative_distance`` applied."""
        if not self.config.relative_distance:
            return distance
        return distance / torch.tan(torch.deg2rad(fovy_deg) / 2)

    def _jitter(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The enabled perturbations as arguments of :func:`orbit`."""
        config = self.config
        offset = _uniform((-config.position_jitter, config.position_jitter), (batch, 3), generator)
        target = config.target_jitter * torch.randn(batch, 3, generator=generator)
        up = torch.tensor([0.0, 0.0, 1.0]) + config.up_jitter * torch.randn(batch, 3, generator=generator)
        jitter = {"offset": offset, "target": target, "up": up}
        sizes = {"offset": config.position_jitter, "target": config.target_jitter, "up": config.up_jitter}
        return {name: value for name, value in jitter.items() if sizes[name] > 0}


def _at(values: int | list[int], stage: int) -> int:
    """The value at ``stage``: an entry of the list, or the single value for all stages."""
    return values[stage] if isinstance(values, list) else values


def _uniform(bounds: Range, size: int | tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform samples of the given size within ``bounds``."""
    low, high = bounds
    shape = (size,) if isinstance(size, int) else size
    return low + (high - low) * torch.rand(*shape, generator=generator)
