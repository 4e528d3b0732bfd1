"""What the tests of all families of priors share: the steps of a diffusers pipeline, tiny runs, changed folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.config.optimizer import OptimizerConfig
from scoredist3d.config.validation import parse_component
from scoredist3d.diffusion.schedule import FlowSchedule, NoiseSchedule
from scoredist3d.priors import CFGConditions, Prior, guided_prediction
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.seeding import Rng
from scoredist3d.training.optimizer import build_optimizer
from shared.method_cases import METHODS, case

PROMPTS = ["a red mug", "a blue chair"]
NEGATIVE = "a front view"
KEY = r"^prior\.pretrained_model_name_or_path: "
"""Begin of an error message about a model, as a regular expression."""
LONG = "a red mug, a blue chair, " * 100
DEFAULT = ("sds", "vsd", "sdi", "ism", "rfds")
METHOD_CASES = [
    pytest.param(method, marks=() if method in DEFAULT else pytest.mark.slow, id=method) for method in METHODS
]
"""All methods; those that are not in :data:`DEFAULT` run with ``--slow``."""
EDITING = [m for m in METHODS if registry.lookup("guidance", m).cls.needs_source]  # type: ignore[attr-defined]
UNEDITED_CASES = [each for each in METHOD_CASES if each.values[0] not in EDITING]
EDITING_CASES = [each for each in METHOD_CASES if each.values[0] in EDITING]


def load(folder: Path, **options: Any) -> DiffusersPrior:
    """The prior of a folder, through the public path."""
    prior: DiffusersPrior = registry.build(
        parse_component("prior", {"type": "diffusers", "pretrained_model_name_or_path": str(folder), **options})
    )
    return prior


def reference_pipeline(cls: Any, folder: Path, **options: Any) -> Any:
    """The pipeline of diffusers that loads a folder."""
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they load those of the files
        pipeline = cls.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(side: int, count: int = 2) -> Tensor:
    """(count, side, side, 3) random images in [0, 1]."""
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(2))


def copy_with(folder: Path, target: Path, file: str = "model_index.json", **entries: Any) -> Path:
    """A copy of a folder with other entries in one of its JSON files."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(content | entries))
    return target


def truncated(folder: Path, target: Path, part: str) -> Path:
    """A copy of a folder in which the weights of one part end early."""
    shutil.copytree(folder, target)
    (file,) = (target / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    return target


@dataclass(frozen=True)
class Step:
    """What a pipeline passes to its scheduler in one step: the guided output at (x_t, timestep)."""

    output: Tensor
    timestep: float
    x_t: Tensor


def recorded(pipeline: Any, *, output_type: str = "latent", **call: Any) -> list[Step]:
    """The steps of one call of a pipeline."""
    steps: list[Step] = []
    step = pipeline.scheduler.step

    def record(output: Tensor, timestep: Any, x_t: Tensor, *arguments: Any, **options: Any) -> Any:
        steps.append(Step(output.clone(), float(timestep), x_t.clone()))
        return step(output, timestep, x_t, *arguments, **options)

    pipeline.scheduler.step = record
    try:
        with torch.random.fork_rng(devices=[]):
            pipeline(output_type=output_type, **call)
    finally:
        del pipeline.scheduler.step
    return steps


def guided_steps(
    pipeline: Any, prior: Prior, *, latents: Callable[[Tensor], Tensor] | None = None, **call: Any
) -> list[Step]:
    """Four recorded steps for :data:`PROMPTS` and images of the prior's size, from fixed noise.

    Args:
        pipeline: The pipeline.
        prior: The prior, whose latents the pipeline packs.
        latents: Latents as the pipeline receives them; by default unchanged.
        call: Other arguments of the pipeline.
    """
    side = prior.image_size
    noise = normal(2, *prior.latent_shape(side, side))
    call = {"prompt": list(PROMPTS), "num_inference_steps": 4, "height": side, "width": side, **call}
    return recorded(pipeline, latents=noise if latents is None else latents(noise), **call)


def conditions_of(prior: Prior, negative: str = NEGATIVE) -> CFGConditions:
    """The conditions of :data:`PROMPTS` and a negative prompt."""
    return CFGConditions(prior.embed(PROMPTS), prior.embed([negative]))


def t_of(schedule: NoiseSchedule, timestep: float) -> float:
    """The prior's t for a timestep of the scheduler."""
    position = timestep / schedule.num_train_timesteps
    shift = schedule.shift if isinstance(schedule, FlowSchedule) else 1.0
    return position / (shift - (shift - 1.0) * position)


def check_predictions(
    prior: Prior, conditions: CFGConditions, scale: float, steps: Sequence[Step], tolerance: float = 1e-4
) -> None:
    """Check eps, x0 and v of the prior against the recorded steps of its pipeline."""
    assert len(steps) >= 3
    for step in steps:
        time = t_of(prior.schedule, step.timestep)
        t = torch.full((len(step.x_t),), time)
        with torch.no_grad():
            prediction = guided_prediction(prior, step.x_t, t, conditions, scale)
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(prediction.output, step.output, **close)
        alpha, sigma = coefficients(prior.schedule, time)
        if isinstance(prior.schedule, FlowSchedule):
            assert prediction.kind == "v_prediction"
            eps, x0, v = step.x_t + alpha * step.output, step.x_t - sigma * step.output, step.output
            wide = close
        elif prior.schedule.prediction_type == "v_prediction":
            v, wide = step.output, close
            eps, x0 = alpha * v + sigma * step.x_t, alpha * step.x_t - sigma * v
        else:
            assert prediction.kind == "epsilon"
            eps, x0 = step.output, (step.x_t - sigma * step.output) / alpha
            v = alpha * eps - sigma * x0
            wide = {"rtol": tolerance, "atol": tolerance / alpha}  # a small alpha amplifies the rounding of the output
        torch.testing.assert_close(prediction.eps, eps, **close)
        torch.testing.assert_close(prediction.x0, x0, **wide)
        torch.testing.assert_close(prediction.v, v, **wide)


def coefficients(schedule: NoiseSchedule, time: float) -> tuple[float, float]:
    """(alpha, sigma) at one t."""
    alpha, sigma = schedule.coefficients(torch.tensor([time], dtype=torch.float64))
    return float(alpha), max(float(sigma), 0.0)


def check_scheduler(prior: Prior, alphas_cumprod: Tensor) -> None:
    """Check the schedule against the table of a diffusers scheduler."""
    t = torch.arange(len(alphas_cumprod), dtype=torch.float64) / len(alphas_cumprod)
    torch.testing.assert_close(prior.schedule.alpha(t) ** 2, alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


def train(prior: Prior, method: str) -> None:
    """Three steps of a method on two free images; the frozen prior does not change."""
    options = case(method).options
    canvas: dict[str, Any] = {"type": "image-canvas", "parametrisation": "latents", "particles": 2}
    if method in EDITING:
        canvas |= {"init_prompt": "red", "init_steps": 2}
    block = {"type": "text-to-2d", "geometry": canvas, "guidance": {"type": method, **options}}
    system = registry.build(parse_component("system", block), prior=prior, prompt=PROMPTS[0], rng=Rng(1))
    before = _output(prior)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01, eps=1e-8), system.parameter_groups())
    parameters = [parameter for group in system.parameter_groups() for parameter in group["params"]]
    start = [parameter.detach().clone() for parameter in parameters]
    for step in range(3):
        system.prepare_step(step, Rng())
        optimizer.zero_grad()
        result = system.training_step(step, Rng())
        result.loss.backward()
        optimizer.step()
        assert all(math.isfinite(float(value)) for value in result.scalars.values())
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)
    assert all(not torch.equal(old, new) for old, new in zip(start, parameters, strict=True))
    assert torch.equal(_output(prior), before), "the frozen prior answers differently now"


def _output(prior: Prior) -> Tensor:
    x, text = normal(1, *prior.latent_shape(prior.image_size, prior.image_size)), prior.embed(PROMPTS[:1])
    conditions = prior.with_image(CFGConditions(text, text), x, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return prior.predict(x, torch.tensor([0.5]), conditions.positive).output
