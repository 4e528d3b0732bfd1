"""A registry of small stand-ins: these tests are about the configuration code, not about which components exist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from scoredist3d.config import ComponentConfig, Schedule, component, component_map, option


@dataclass
class GridConfig:
    levels: int = option(8, "Levels.", ge=1, le=32)
    scale: float = option(1.5, "Growth.", ge=1)


@dataclass
class OptimizerConfig:
    lr: Schedule = option(0.01, "Learning rate.", ge=0)
    betas: tuple[float, float] = option((0.9, 0.99), "Decay rates.", ge=0, lt=1)
    groups: dict[str, Schedule] = option({}, "Rates of groups.", ge=0)


class Component:
    def __init__(self, config: Any, **runtime: Any):
        self.config, self.runtime = config, runtime


class Prior(Component):
    @dataclass
    class Config(ComponentConfig):
        path: str = option("embedded", "Folder.")


class Sds(Component):
    @dataclass
    class Config(ComponentConfig):
        guidance_scale: Schedule = option(7.5, "gamma.", ge=0)
        t_range: tuple[float, float] = option((0.02, 0.98), "Noise levels.", gt=0, lt=1)
        weighting: Literal["sds", "uniform"] = option("sds", "w(t).")
        clip: float | None = option(None, "Largest element.", gt=0)
        guarded: bool = option(True, "Stop where not finite.")

        def validate(self) -> list[str]:
            low, high = self.t_range
            return [] if low <= high else [f"t_range: the first value must not exceed the second, got [{low}, {high}]"]


class Sdi(Component):
    @dataclass
    class Config(ComponentConfig):
        guidance_scale: Schedule = option(7.5, "gamma.", ge=0)
        inversion_steps: int = option(10, "Steps.", ge=1)


class Volume(Component):
    @dataclass
    class Config(ComponentConfig):
        # A string annotation that names a class nested in another one, as components write it.
        radius: float = option(1.0, "Radius.", gt=0)
        grid: GridConfig = field(default_factory=lambda: GridConfig(levels=4))
        fine: GridConfig | None = option(None, "A second grid.")


class Sparsity(Component):
    @dataclass
    class Config(ComponentConfig):
        weight: Schedule = option(1.0, "Factor.", ge=0)
        epsilon: float = option(0.01, "Softness.", gt=0)


class System(Component):
    @dataclass
    class Config(ComponentConfig):
        guidance: ComponentConfig = component("guidance", "sds", "Guidance.")
        geometry: ComponentConfig = component("geometry", "volume", "Geometry.")
        texture: ComponentConfig | None = component("material", None, "Only where wanted.")
        loss: dict[str, ComponentConfig] = component_map("loss", "Losses.")
        optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


class Flat(Component):
    @dataclass
    class Config(ComponentConfig):
        guidance: ComponentConfig = component("guidance", "sds", "Guidance.")


class Camera(Component):
    @dataclass
    class Config(ComponentConfig):
        batch_size: int | list[int] = option(4, "Views.", ge=1)
        milestones: list[int] = option([], "Steps.", ge=1)


class Material(Component):
    @dataclass
    class Config(ComponentConfig):
        color: tuple[float, float, float] = option(help="Required here.", ge=0, le=1)


class Exporter(Component):
    @dataclass
    class Config(ComponentConfig):
        formats: list[Literal["glb", "obj"]] = option(["glb"], "Files.")


COMPONENTS = (
    ("prior", "diffusers", Prior),
    ("guidance", "sds", Sds),
    ("guidance", "sdi", Sdi),
    ("geometry", "volume", Volume),
    ("loss", "sparsity", Sparsity),
    ("system", "text-to-3d", System),
    ("system", "text-to-2d", Flat),
    ("data", "random-camera", Camera),
    ("material", "paint", Material),
    ("exporter", "textured-mesh", Exporter),
)
