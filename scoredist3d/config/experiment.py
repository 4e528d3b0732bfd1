"""The configuration of a whole run: the root of the typed configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scoredist3d.config.coercion import shown
from scoredist3d.config.fields import Block, ComponentConfig, component, option
from scoredist3d.limits import MAX_FRAMES

LONGEST_NAME = 200
"""Largest length of ``name`` and ``tag`` in bytes; file systems allow 255, and a tag is followed by the time."""


@dataclass
class TrainerConfig(Block):
    """Length, precision and gradient handling of the optimization."""

    max_steps: int = option(1000, "Number of optimizer steps.", ge=1)
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = option(
        "32-true",
        "Floating-point precision of the optimization. A CPU requires 32-true; bf16 was measured to be "
        "26 times slower on a CPU.",
    )
    accumulate: int = option(1, "Number of batches whose gradients are averaged for one optimizer step.", ge=1)
    gradient_clip_norm: float | None = option(
        None, "Maximum L2 norm of the gradient of all parameters together; null disables clipping.", gt=0
    )
    grace_seconds: float = option(
        30.0,
        "Time in seconds for the current step and a checkpoint after a signal to stop; then the run ends with its "
        "last checkpoint. Set it below the time after which docker stop (10 s) or SLURM kills the run.",
        ge=0,
        le=1e6,
    )
    detect_anomaly: bool = option(False, "Make autograd report the operation that produced a NaN gradient (slow).")
    schedule_steps: int | None = option(
        None,
        "Value of ${trainer.max_steps} in other fields, such as the end of a schedule; null uses max_steps. "
        "A run that is resumed with a different max_steps keeps the value of its first session.",
        ge=1,
    )


@dataclass
class CheckpointConfig(Block):
    """Checkpoints of a run. ``ckpts/last.ckpt`` is always written at the end of a run and when a run is interrupted."""

    every_n_steps: int = option(
        500, "Save a checkpoint at every multiple of this number of steps; 0 saves one only at the end.", ge=0
    )
    keep: int = option(1, "Number of checkpoints to keep; older ones are deleted.", ge=1)


@dataclass
class PreviewConfig(Block):
    """Image grids rendered during training."""

    every_n_steps: int = option(100, "Save a grid at every multiple of this number of steps; 0 saves none.", ge=0)
    azimuths: list[float] = option(
        [0.0, 90.0, 180.0, 270.0], "Azimuths of the views in a grid, in degrees; 0 is the front.", ge=-360, le=360
    )
    elevation: float = option(15.0, "Elevation of the camera in degrees above the horizon.", ge=-90, le=90)
    size: int = option(128, "Width and height of one view in pixels.", ge=8, le=4096)

    def validate(self) -> list[str]:
        """Check that there is at least one azimuth."""
        return [] if self.azimuths else ["azimuths: must contain an angle; set every_n_steps=0 to disable previews"]


@dataclass
class LogConfig(Block):
    """Options for logging the metrics of the optimization."""

    every_n_steps: int = option(10, "Number of steps between two entries in metrics.csv and TensorBoard.", ge=1)
    tensorboard: bool = option(True, "Also write TensorBoard events.")


@dataclass
class TurntableConfig(Block):
    """The turntable video of the finished object."""

    enabled: Literal["auto"] | bool = option(
        "auto",
        "Write the video after training. auto: yes, except for a stage of a pipeline that another stage follows.",
    )
    frames: int = option(60, "Number of frames in one full turn.", ge=1, le=MAX_FRAMES)
    fps: int = option(30, "Frames per second.", ge=1, le=240)
    height: int = option(256, "Height of the video in pixels; must be even for mp4.", ge=8, le=4096)
    width: int = option(256, "Width of the video in pixels; must be even for mp4.", ge=8, le=4096)
    elevation: float = option(15.0, "Elevation of the camera in degrees above the horizon.", ge=-90, le=90)
    format: Literal["mp4", "gif", "webp"] = option("mp4", "File format; gif and webp need no ffmpeg.")

    def validate(self) -> list[str]:
        """Check that the width and height of an mp4 are even, as its codec requires."""
        return [
            f"{name}: must be even for mp4, got {getattr(self, name)}"
            for name in ("height", "width")
            if self.format == "mp4" and getattr(self, name) % 2
        ]


@dataclass
class ExperimentConfig(Block):
    """The configuration of a whole run.

    The ``type`` of a component block selects the class that defines the other keys of the block.
    """

    prompt: str = option(help="Description of the object or image.", example='prompt="a red mug"')
    negative_prompt: str = option("", "Description of content to avoid; replaces the empty prompt in guidance.")
    name: str = option("scoredist3d", "Folder inside output_root that contains the runs of this configuration.")
    tag: str = option("", "First part of the run folder name, <tag>@<time>; if empty, it is derived from the prompt.")
    seed: int = option(0, "Seed of all random number generators.", ge=0)
    output_root: str = option("outputs", "Folder that contains all runs, relative to the working directory.")
    prior: ComponentConfig = component("prior", "diffusers", "The frozen diffusion model.")
    system: ComponentConfig = component("system", "text-to-3d", "The representation, the guidance and the losses.")
    data: ComponentConfig = component("data", "random-camera", "The source of the cameras for each step.")
    exporter: ComponentConfig = component(
        "exporter", "textured-mesh", "The exporter, which writes the result to files."
    )
    trainer: TrainerConfig = field(
        default_factory=TrainerConfig, metadata={"help": "Length, precision and gradient handling."}
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata={"help": "Checkpoints of the run."})
    preview: PreviewConfig = field(default_factory=PreviewConfig, metadata={"help": "Image grids during training."})
    log: LogConfig = field(default_factory=LogConfig, metadata={"help": "Logged metrics."})
    test: TurntableConfig = field(default_factory=TurntableConfig, metadata={"help": "The turntable video."})

    def validate(self) -> list[str]:
        """Check that the prompt is not empty and that name and tag are valid folder names."""
        problems = []
        if not self.prompt.strip():
            problems.append('prompt: must not be empty; set it, for example with prompt="a red mug"')
        for name in ("name", "tag"):
            value = getattr(self, name)
            if "/" in value or "\\" in value or value in (".", ".."):
                problems.append(f"{name}: must be a single folder name without slashes, got {shown(value)}")
            elif not value.isprintable() or len(value.encode()) > LONGEST_NAME:
                problems.append(
                    f"{name}: must be a folder name of at most {LONGEST_NAME} bytes without control characters, "
                    f"got {shown(value)}"
                )
        if not self.name:
            problems.append("name: must not be empty; set it to the name of a folder")
        if not self.output_root or not self.output_root.isprintable():
            problems.append(f"output_root: must be the path of a folder, got {shown(self.output_root)}")
        return problems
