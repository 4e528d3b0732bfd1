"""What one run consists of: the root of the typed configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scoredist3d.config.fields import Block, ComponentConfig, component, option


@dataclass
class TrainerConfig(Block):
    """How long and how exactly the optimisation runs."""

    max_steps: int = option(1000, "Optimiser steps.", ge=1)
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = option(
        "32-true", "Arithmetic of the run. Keep 32-true on a CPU: bf16 was measured 26 times slower there."
    )
    accumulate: int = option(1, "Batches whose gradients are averaged into one optimiser step.", ge=1)
    gradient_clip_norm: float | None = option(
        None, "Largest L2 norm of all gradients together; null does not clip.", gt=0
    )
    detect_anomaly: bool = option(False, "Let autograd name the operation behind a non-finite gradient (slow).")
    schedule_steps: int | None = option(
        None,
        "Steps that ${trainer.max_steps} stands for in other values, such as the end of a schedule; null is max_steps. "
        "A resumed run with another max_steps keeps the number of its first session.",
        ge=1,
    )


@dataclass
class CheckpointConfig(Block):
    """When the run's state is saved. ``ckpts/last.ckpt`` is always written at the end and on an interrupt."""

    every_n_steps: int = option(500, "Save at every multiple of this many steps; 0 saves only at the end.", ge=0)
    keep: int = option(1, "How many of the newest checkpoints stay on disk.", ge=1)


@dataclass
class PreviewConfig(Block):
    """Grids of images rendered on the way."""

    every_n_steps: int = option(100, "Save a grid at every multiple of this many steps; 0 saves none.", ge=0)
    azimuths: list[float] = option(
        [0.0, 90.0, 180.0, 270.0], "Degrees; one column each, 0 is the front.", ge=-360, le=360
    )
    elevation: float = option(15.0, "Degrees above the horizon.", ge=-90, le=90)
    size: int = option(128, "Pixels per side of one image.", ge=8, le=4096)

    def validate(self) -> list[str]:
        """A grid has at least one column."""
        return [] if self.azimuths else ["azimuths: must hold at least one angle; every_n_steps=0 turns previews off"]


@dataclass
class LogConfig(Block):
    """What is written down about the optimisation, and how often."""

    every_n_steps: int = option(10, "Steps between two lines of metrics.csv and TensorBoard.", ge=1)
    tensorboard: bool = option(True, "Also write TensorBoard events.")


@dataclass
class TurntableConfig(Block):
    """The video around the finished object."""

    frames: int = option(60, "Number of frames, one turn in all.", ge=1)
    fps: int = option(30, "Frames per second.", ge=1, le=240)
    height: int = option(256, "Pixels; even for an mp4.", ge=8, le=4096)
    width: int = option(256, "Pixels; even for an mp4.", ge=8, le=4096)
    elevation: float = option(15.0, "Degrees above the horizon.", ge=-90, le=90)
    format: Literal["mp4", "gif", "webp"] = option("mp4", "Kind of video; gif and webp need no ffmpeg.")

    def validate(self) -> list[str]:
        """The codec of mp4 files wants even sizes."""
        return [
            f"{name}: must be even, got {getattr(self, name)}"
            for name in ("height", "width")
            if self.format == "mp4" and getattr(self, name) % 2
        ]


@dataclass
class ExperimentConfig(Block):
    """A whole run. Component blocks are typed by the classes that their ``type`` names."""

    prompt: str = option(help="What to make.", example='prompt="a red mug"')
    negative_prompt: str = option("", "What to stay away from; takes the place of the empty prompt in guidance.")
    name: str = option("scoredist3d", "Folder of the run under output_root.")
    tag: str = option("", "First part of the run's own folder, <tag>@<time>; empty makes it from the prompt.")
    seed: int = option(0, "Everything random is derived from this number.", ge=0)
    output_root: str = option("outputs", "Folder of all runs, relative to where the program is started.")
    prior: ComponentConfig = component("prior", "diffusers", "The diffusion model that judges the images.")
    system: ComponentConfig = component("system", "text-to-3d", "What is optimised, and by which guidance and losses.")
    data: ComponentConfig = component("data", "random-camera", "Where the cameras of each step come from.")
    exporter: ComponentConfig = component(
        "exporter", "textured-mesh", "How the result becomes a file for other programs."
    )
    trainer: TrainerConfig = field(default_factory=TrainerConfig, metadata={"help": "Length and precision."})
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata={"help": "Saved states."})
    preview: PreviewConfig = field(default_factory=PreviewConfig, metadata={"help": "Images on the way."})
    log: LogConfig = field(default_factory=LogConfig, metadata={"help": "Metrics."})
    test: TurntableConfig = field(default_factory=TurntableConfig, metadata={"help": "The turntable video."})

    def validate(self) -> list[str]:
        """An empty prompt, or names that are no folder names."""
        problems = []
        if not self.prompt.strip():
            problems.append('prompt: must not be empty; give it as prompt="a red mug"')
        for name in ("name", "tag"):
            value = getattr(self, name)
            if "/" in value or "\\" in value or value in (".", ".."):
                problems.append(f"{name}: must be one folder name without slashes, got {value!r}")
        if not self.name:
            problems.append("name: must not be empty")
        return problems
