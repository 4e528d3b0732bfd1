"""Checks that the devices of a run suit its floating-point precision."""

from __future__ import annotations

from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.training.distributed import Devices, DeviceSpec


def check_precision(config: ExperimentConfig, devices: DeviceSpec) -> None:
    """Check that the devices support ``trainer.precision``.

    Raises:
        ConfigError: The config sets mixed precision, and the device is a CPU.
    """
    precision = config.trainer.precision
    if Devices.parse(devices).kind != "cpu" or precision == "32-true":
        return
    problem = (
        "computes in float16, which is slower than float32 on a CPU and overflows above 65504"
        if precision == "16-mixed"
        else "computes in bfloat16, which is many times slower than float32 on most CPUs"
    )
    raise ConfigError(
        f"trainer.precision: {precision} {problem}. Add trainer.precision=32-true to the command, or choose a GPU with "
        "--gpu 0."
    )


def slow_prior_warning(config: ExperimentConfig, devices: Devices) -> str | None:
    """Warning about a prior in half precision on a CPU, which saves memory but is slow; None in all other cases."""
    precision = getattr(config.prior, "precision", None)
    if devices.kind != "cpu" or precision not in ("fp16", "bf16"):
        return None
    return (
        f"prior.precision: {precision} halves the memory of the prior, but is many times slower than fp32 on most "
        "CPUs; add prior.precision=fp32 to the command if the prior then fits into memory."
    )
