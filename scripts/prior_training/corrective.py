"""Training of LMC's corrective: clean latents, held-out targets, and regression to the one-step prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from scoredist3d.priors import CFGConditions, Conditioning, Prior, sample
from scoredist3d.procedural import render_objects, sample_objects

from .cameras import training_cameras
from .common import Ema, learning_rate
from .compositing import composite, random_backgrounds

BINS = 10
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CHUNK = 256

Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run.

    Attributes:
        steps: Largest number of steps.
        batch: Batch size.
        lr: Learning rate of Adam; it decays in the second half.
        ema: Decay of the moving average of the weights, which is the result.
        width, depth: Size of the network.
        t_min, t_max: Range of the timesteps, which are drawn uniformly.
        balance: Divide the error at each timestep by that of the identity, so that the small errors at low timesteps
            have as much influence as the large ones at high timesteps.
        latents: Number of clean latents for training.
        holdout: Number of clean latents for evaluation.
        evaluations: Number of evaluations, evenly spaced.
        knee, patience: Stop when the last ``patience`` evaluations contributed less than the fraction ``knee`` of the
            total improvement.
        targets: Draw this number of predictions once and train on them, for slow machines; 0 draws new ones at every
            step.
        sampling_steps, scale: Steps and guidance scale for clean latents that are samples of the prior.
        seed: Seed of all random numbers.
    """

    steps: int = 8000
    batch: int = 256
    lr: float = 1e-3
    ema: float = 0.999
    width: int = 48
    depth: int = 2
    t_min: float = 0.02
    t_max: float = 0.98
    balance: int = 1
    latents: int = 40_000
    holdout: int = 4096
    evaluations: int = 40
    knee: float = 0.002
    patience: int = 4
    targets: int = 0
    sampling_steps: int = 25
    scale: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class CleanLatents:
    """Clean latents (N, C, h, w) with their unconditional conditionings (N items, or one for all)."""

    z: Tensor
    unconditional: Conditioning

    def __getitem__(self, index: Tensor) -> CleanLatents:
        """The latents at ``index`` with their conditionings."""
        one = len(self.unconditional) == 1
        return CleanLatents(self.z[index], self.unconditional if one else self.unconditional[index])


@torch.no_grad()
def rendered_latents(prior: Prior, count: int, generator: torch.Generator) -> CleanLatents:
    """Encoded renders of procedural objects over white or a random gray, 80 % of them with their camera."""
    device = generator.device
    parts = []
    empty = prior.embed([""])
    for size in chunks(count):
        objects = sample_objects(size, generator, device)
        cameras = training_cameras(size, prior.image_size, generator, device)
        rgba = render_objects(objects, cameras, antialias=2).rgba.movedim(-1, 1)
        background = random_backgrounds(size, generator, device, white=0.5, gray=0.5)
        z = prior.encode(composite(rgba, background).movedim(1, -1))
        blind = torch.rand(size, generator=generator, device=device) < 0.2
        camera = prior.camera_condition(cameras, size)
        camera = None if camera is None else torch.where(blind[:, None], 0.0, camera)
        parts.append((z, Conditioning(empty.text.expand(size, -1, -1), camera)))
    return CleanLatents(torch.cat([z for z, _ in parts]), Conditioning.cat([c for _, c in parts]))


@torch.no_grad()
def sampled_latents(
    prior: Prior, count: int, generator: torch.Generator, *, prompts: Sequence[str], steps: int, scale: float
) -> CleanLatents:
    """Samples of the prior for random prompts, from random cameras if the prior takes cameras."""
    device = generator.device
    parts = []
    for size in chunks(count):
        cameras = training_cameras(size, prior.image_size, generator, device) if prior.takes_cameras else None
        chosen = torch.randint(0, len(prompts), (size,), generator=generator, device=device).tolist()
        unconditional = prior.embed([""] * size, cameras)
        conditions = CFGConditions(prior.embed([prompts[index] for index in chosen], cameras), unconditional)
        z = sample(prior, conditions, steps=steps, scale=scale, generator=generator)
        parts.append((z.float(), unconditional))
    return CleanLatents(torch.cat([z for z, _ in parts]), Conditioning.cat([c for _, c in parts]))


@torch.no_grad()
def pictured_latents(prior: Prior, folder: Path, device: torch.device) -> CleanLatents:
    """Encoded images of a folder, cropped to squares of the prior's size, in the order of their names.

    Raises:
        ValueError: The folder contains fewer than two images.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if len(paths) < 2:
        raise ValueError(
            f"--images: {folder} contains {len(paths)} images ({', '.join(PICTURES)}); at least two are needed"
        )
    codes = []
    for start in range(0, len(paths), CHUNK):
        rgb = []
        for path in paths[start : start + CHUNK]:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (prior.image_size, prior.image_size))
            rgb.append(torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255.0))
        codes.append(prior.encode(torch.stack(rgb).to(device)))
    return CleanLatents(torch.cat(codes), prior.embed([""]))


def chunks(count: int) -> list[int]:
    """Sizes of chunks of at most :data:`CHUNK` items, ``count`` in total."""
    return [min(CHUNK, count - start) for start in range(0, count, CHUNK)]


@torch.no_grad()
def one_step(prior: Prior, clean: CleanLatents, t: Tensor, generator: torch.Generator) -> Tensor:
    """The target of the regression, x0_u(alpha z + sigma eps, t)."""
    eps = torch.randn(clean.z.shape, generator=generator, device=clean.z.device, dtype=clean.z.dtype)
    x_t = prior.schedule.add_noise(clean.z, eps, t)
    return prior.predict(x_t, t, clean.unconditional.expand(len(t))).x0


@dataclass(frozen=True)
class Holdout:
    """Fixed targets for evaluation.

    Attributes:
        z: (N, C, h, w), clean latents.
        t: (N,), timesteps.
        target: (N, C, h, w), predictions for one draw of the noise.
        bin: (N,) int64, bin of each timestep.
        floor: (BINS,), variance of the target over the noise, which is the lowest error of a network that sees only z.
        identity: (BINS,), error of b(z, t) = z.
    """

    z: Tensor
    t: Tensor
    target: Tensor
    bin: Tensor
    floor: Tensor
    identity: Tensor

    @classmethod
    def make(cls, prior: Prior, clean: CleanLatents, recipe: Recipe, generator: torch.Generator) -> Holdout:
        """Build the targets at evenly spaced timesteps; the floor is estimated from two draws of the noise."""
        count = len(clean.z)
        share = (torch.arange(count, device=clean.z.device) + 0.5) / count
        t = prior.schedule.quantize(recipe.t_min + (recipe.t_max - recipe.t_min) * share.to(clean.z.dtype))
        bin_ = bins(t, recipe)
        parts = [clean[index] for index in torch.arange(count, device=clean.z.device).split(CHUNK)]
        first, second = (
            torch.cat(
                [
                    one_step(prior, part, timestep, generator)
                    for part, timestep in zip(parts, t.split(CHUNK), strict=True)
                ]
            )
            for _ in range(2)
        )
        floor = per_bin(0.5 * square(first - second), bin_)
        return cls(clean.z, t, first, bin_, floor, per_bin(square(clean.z - first), bin_))

    @torch.no_grad()
    def error(self, network: Network) -> Tensor:
        """Mean squared error of a corrective, (BINS,)."""
        parts = zip(self.z.split(CHUNK), self.t.split(CHUNK), strict=True)
        return per_bin(square(torch.cat([network(z, t) for z, t in parts]) - self.target), self.bin)


def square(difference: Tensor) -> Tensor:
    """Mean square of each item, (N,)."""
    return difference.square().flatten(1).mean(1)


def per_bin(values: Tensor, bin_: Tensor) -> Tensor:
    """Mean of the values in each bin, (BINS,)."""
    total = torch.zeros(BINS, device=values.device, dtype=values.dtype)
    ones = torch.ones_like(values)
    return total.scatter_add(0, bin_, values) / total.scatter_add(0, bin_, ones).clamp_min(1.0)


@dataclass(frozen=True)
class Result:
    """Averaged network at its best evaluation, number of training steps, and errors (BINS,)."""

    network: nn.Module
    steps: int
    error: Tensor


def fit(
    network: nn.Module,
    prior: Prior,
    clean: CleanLatents,
    holdout: Holdout,
    recipe: Recipe,
    generator: torch.Generator,
    note: Callable[[str], None] = print,
) -> Result:
    """Minimize E || b(z, t) - x0_u(alpha z + sigma eps, t) ||^2 over z, t and eps, until the knee of the loss.

    Raises:
        FloatingPointError: The held-out loss is not finite.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
    ema = Ema(network, recipe.ema)
    weight = balance(holdout, recipe)
    start = float((holdout.identity * weight).mean())
    values, best = [start], copy.deepcopy(ema.module)
    every = max(1, recipe.steps // recipe.evaluations)
    step = 0
    for z, t, target in batches(prior, clean, recipe, generator):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.steps, recipe.lr, warmup=min(200, recipe.steps // 10))
        loss = (square(network(z, t) - target) * weight[bins(t, recipe)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(network)
        step += 1
        if step % every and step < recipe.steps:
            continue
        measured = holdout.error(ema.module)
        values.append(float((measured * weight).mean()))
        if not math.isfinite(values[-1]):
            raise FloatingPointError(f"the held-out loss is {values[-1]} at step {step}; lower --lr")
        if values[-1] <= min(values):
            best = copy.deepcopy(ema.module)
        note(f"{step}/{recipe.steps} held-out {values[-1]:.4f}, by timestep {compact(measured)}")
        if at_knee(values, recipe):
            note(f"knee reached at step {step}")
            break
        if step == recipe.steps:
            break
    return Result(best, step, holdout.error(best))


def batches(
    prior: Prior, clean: CleanLatents, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of clean latents, timesteps and targets."""
    device = clean.z.device

    def pick(count: int, among: int) -> Tensor:
        return torch.randint(0, among, (count,), generator=generator, device=device)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = clean[pick(count, len(clean.z))]
        share = torch.rand(count, generator=generator, device=device, dtype=clean.z.dtype)
        t = prior.schedule.quantize(recipe.t_min + (recipe.t_max - recipe.t_min) * share)
        return chosen.z, t, one_step(prior, chosen, t, generator)

    if not recipe.targets:
        while True:
            yield draw(recipe.batch)
    kept = [torch.cat(parts) for parts in zip(*map(draw, chunks(recipe.targets)), strict=True)]
    while True:
        index = pick(recipe.batch, recipe.targets)
        yield kept[0][index], kept[1][index], kept[2][index]


def bins(t: Tensor, recipe: Recipe) -> Tensor:
    """Bin of each timestep, (N,)."""
    share = (t - recipe.t_min) / max(recipe.t_max - recipe.t_min, 1e-6)
    return (BINS * share).long().clamp(0, BINS - 1)


def balance(holdout: Holdout, recipe: Recipe) -> Tensor:
    """Weight of the error in each bin, (BINS,)."""
    if not recipe.balance:
        return torch.ones_like(holdout.identity)
    return 1.0 / holdout.identity.clamp_min(1e-3 * holdout.identity.max())


def at_knee(values: Sequence[float], recipe: Recipe) -> bool:
    """Whether the last ``patience`` evaluations contributed less than ``knee`` of the total improvement."""
    if len(values) <= recipe.patience:
        return False
    return values[-1 - recipe.patience] - values[-1] < recipe.knee * (values[0] - values[-1])


def compact(values: Tensor) -> str:
    """Values with four decimals, separated by spaces."""
    return " ".join(f"{value:.4f}" for value in values.tolist())
