"""Stage of the surface estimator: trained on renders of objects and on the prior's denoised versions of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.priors import CFGConditions, Prior
from scoredist3d.procedural import (
    Objects,
    captions_for,
    captions_for_scenes,
    sample_objects,
    sample_scenes,
)
from scoredist3d.procedural.surface_estimator import LEAST_ERROR, SurfaceEstimator, normal_error

from .acceleration import GradientStep, accelerate
from .cameras import training_cameras
from .common import Ema, Stage, build_optimizer
from .compositing import random_backgrounds
from .parts import Renderer

PEAK_LR = 2e-3
_BLOCK, _GROUP = 256, 4096
_PAIRS = 0.06  # share of the views that show two objects
_T_RANGE = (0.02, 0.32)  # timesteps from which views are denoised
_SCALE = 3.0  # guidance scale of the denoising
_CLEAN = 0.25  # share of the views that are neither noised nor encoded


@dataclass(frozen=True)
class Surfaces:
    """``V`` images with their visible surfaces.

    Attributes:
        image: (V, H, W, 3) uint8; a render, or the prior's denoised version of one.
        background: (V, 3), its background.
        normal: (V, H, W, 3) int8, outward unit normals in the world, times 127; zero where the opacity is zero.
        depth: (V, H, W) float16, distance along the ray; 0 where the opacity is zero.
        opacity: (V, H, W) uint8.
        cameras: V cameras.
    """

    image: Tensor
    background: Tensor
    normal: Tensor
    depth: Tensor
    opacity: Tensor
    cameras: Cameras

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Tensor) -> Surfaces:
        """Some of the views."""
        image, background, normal, depth, opacity = (tensor[index] for tensor in self.tensors())
        return Surfaces(image, background, normal, depth, opacity, self.cameras[index])

    def tensors(self) -> tuple[Tensor, ...]:
        """All attributes but the cameras, in their order."""
        return self.image, self.background, self.normal, self.depth, self.opacity

    def inputs(self) -> tuple[Tensor, Tensor, Cameras]:
        """Images, backgrounds and cameras in the form that the estimator takes."""
        images = self.image.float() / 255.0
        return images, self.background[:, None, None, :].expand_as(images), self.cameras

    def mirrored(self, where: Tensor) -> Surfaces:
        """The same views, of which those ``where`` (V,) is true show mirror images of their objects.

        A camera whose x axis is reversed sees the mirror image, and the light and the normals in its axes change as
        they would with a camera on the other side of the light. So mirror images have the distribution of the views.
        """
        maps = (self.image, self.normal, self.depth, self.opacity)
        image, normal, depth, opacity = (torch.where(where.view(-1, *[1] * (x.ndim - 1)), x.flip(2), x) for x in maps)
        sign = torch.ones_like(self.cameras.c2w[:, 0])
        sign[:, 0] = torch.where(where, -1.0, 1.0)
        cameras = replace(self.cameras, c2w=self.cameras.c2w * sign[:, None, :])
        return Surfaces(image, self.background, normal, depth, opacity, cameras)


class SurfacePool:
    """Renders random objects and scenes, and denoises the renders with the prior.

    Args:
        prior: The prior.
        count: Number of views.
        seed: Seed; each call of :meth:`fill` derives its own from it.
        antialias: Rays per pixel along each axis.
        denoise_steps: DDIM steps from the noisy render to the image.
        compile_: Whether to compile the ray caster.
    """

    def __init__(
        self, prior: Prior, count: int, *, seed: int, antialias: int = 2, denoise_steps: int = 4, compile_: bool = False
    ) -> None:
        self.prior, self.count, self.seed, self.denoise_steps = prior, count, seed, denoise_steps
        self.device = next(prior.parameters()).device
        self._renderer = Renderer(prior.image_size, antialias, self.device, compile_)

    @torch.no_grad()
    def fill(self, filling: int) -> Surfaces:
        """New views of new objects."""
        seed = self.seed * 1000 + filling
        generator, rng = torch.Generator(self.device).manual_seed(seed), random.Random(seed)
        blocks: list[Surfaces] = []
        for start in range(0, self.count, _GROUP):
            count = min(_GROUP, self.count - start)
            paired = round(_PAIRS * count)
            for size, pairs in ((count - paired, False), (paired, True)):
                blocks += self._group(size, generator, rng, pairs=pairs) if size else []
        names = ("image", "background", "normal", "depth", "opacity")
        parts: dict[str, Any] = {name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
        return Surfaces(**parts, cameras=Cameras.cat([block.cameras for block in blocks]))

    def _group(self, count: int, generator: torch.Generator, rng: random.Random, *, pairs: bool) -> list[Surfaces]:
        """Blocks of views of objects that are sampled and captioned together, which saves most of the time."""
        cameras = training_cameras(count, self.prior.image_size, generator, self.device, varied=False)
        items, texts = self._items(count, generator, rng, pairs)
        positive, unconditional = self.prior.embed(texts, cameras), self.prior.embed([""] * count, cameras)
        order = torch.arange(count, device=self.device)
        return [
            self._block(items[part], cameras[part], CFGConditions(positive[part], unconditional[part]), generator)
            for part in order.split(_BLOCK)
        ]

    def _block(self, items: Objects, cameras: Cameras, conditions: CFGConditions, generator: Any) -> Surfaces:
        render = self._renderer.render(items, cameras)
        background = random_backgrounds(len(items), generator, self.device, white=0.4, gray=0.4)[..., 0, 0]
        image = self._denoised(render.over(background), conditions, generator)
        return Surfaces(
            image=(255 * image).round().to(torch.uint8),
            background=background,
            normal=(127 * render.normal).round().to(torch.int8),
            depth=render.depth.half(),
            opacity=(255 * render.rgba[..., 3]).round().to(torch.uint8),
            cameras=cameras,
        )

    def _items(
        self, count: int, generator: torch.Generator, rng: random.Random, pairs: bool
    ) -> tuple[Objects, list[str]]:
        """Single objects, or scenes of two objects each, and their captions."""
        if pairs:
            scenes = sample_scenes(count, generator, self.device)
            return scenes.objects, captions_for_scenes(scenes, rng)
        objects = sample_objects(count, generator, self.device)
        return objects, [caption.text for caption in captions_for(objects, rng)]

    def _denoised(self, image: Tensor, conditions: CFGConditions, generator: torch.Generator) -> Tensor:
        """Renders (B, H, W, 3) as they are or after noise, denoising steps and decoding; in [0, 1]."""
        prior, device = self.prior, self.device
        chance = torch.rand(2, len(image), generator=generator, device=device)
        start = _T_RANGE[0] + (_T_RANGE[1] - _T_RANGE[0]) * chance[0]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = prior.encode(image)
            x = prior.schedule.add_noise(z, torch.randn(z.shape, generator=generator, device=device), start)
            for step in range(self.denoise_steps):
                t = start * (1.0 - step / self.denoise_steps)
                s = start * (1.0 - (step + 1) / self.denoise_steps)
                prediction = guided_prediction(prior, x, t, conditions, _SCALE)
                x = prior.schedule.ddim_step(prediction.eps, prediction.x0, t, s)
            decoded = prior.decode(prediction.x0).float().clamp(0.0, 1.0)
        return torch.where((chance[1] < _CLEAN)[:, None, None, None], image, decoded)


def surface_loss(estimator: SurfaceEstimator, surfaces: Surfaces) -> Tensor:
    """Training loss for views: negative log-likelihoods of normals, depths and opacities.

    The error e of a normal is ||N - N'||_1 + 1 - <N, N'>, that of a depth is its absolute value. Both have a Laplace
    distribution whose scale b the network estimates, too: e / b + log b.
    """
    images, backgrounds, cameras = surfaces.inputs()
    maps = estimator.raw(images, backgrounds, cameras)
    opacity = surfaces.opacity.float() / 255.0
    covered = (opacity > 0.5).float()
    pixels = covered.sum().clamp_min(1.0)
    world_to_camera = cameras.c2w[:, None, None, :3, :3].transpose(3, 4)
    normal = surfaces.normal.float() / 127.0
    target = functional.normalize((world_to_camera * normal[..., None, :]).sum(-1), dim=-1)
    estimate = functional.normalize(maps[:, :3].movedim(1, -1), dim=-1)
    normals = normal_error(estimate, target)
    relative = surfaces.depth.float() - cameras.origins.norm(dim=-1)[:, None, None]
    depths = (maps[:, 3] - relative).abs()
    mask = functional.binary_cross_entropy_with_logits(maps[:, 4], opacity)
    scales = maps[:, 5:].exp() + LEAST_ERROR
    likelihood = normals / scales[:, 0] + depths / scales[:, 1] + scales.log().sum(1)
    return (likelihood * covered).sum() / pixels + mask


def _loss_of_tensors(estimator: SurfaceEstimator, *tensors: Tensor) -> Tensor:
    """The loss for the tensors of views, the poses of their cameras and the fields of view."""
    image, background, normal, depth, opacity, c2w, fovy = tensors
    cameras = Cameras.from_poses(c2w, fovy, *image.shape[1:3])
    return surface_loss(estimator, Surfaces(image, background, normal, depth, opacity, cameras))


def train_surface_estimator(
    pool: SurfacePool,
    estimator: SurfaceEstimator,
    *,
    steps: int,
    batch: int,
    refills: int,
    minutes: float,
    work: Path,
    generator: torch.Generator,
    peak_lr: float = PEAK_LR,
    hold: float = 0.4,
) -> SurfaceEstimator:
    """Train the estimator and return its averaged weights.

    Args:
        pool: Source of the views.
        estimator: Network to train, on the device of the pool.
        steps: Number of steps, or a first guess if ``minutes`` is positive.
        batch: Images per step.
        refills: How often the views are replaced by new ones, at equal distances.
        minutes: Duration of the training in minutes without the first filling; 0 for exactly ``steps`` steps.
        work: Folder of the state file.
        generator: Source of the batches.
        peak_lr, hold: See :class:`.common.Stage`.
    """
    device = pool.device
    estimator = estimator.to(device).requires_grad_(True).train()
    optimizer = build_optimizer(estimator, peak_lr, weight_decay=0.01)
    ema = Ema(estimator, 0.999)
    stage = Stage(
        "surface-estimator",
        {"estimator": estimator},
        optimizer,
        {"estimator": ema},
        steps,
        work,
        peak_lr,
        generator,
        min(200, max(1, steps // 5)),
        hold=hold,
        minutes=minutes,
    )
    stage.resume(device)
    accelerate(estimator)
    step = GradientStep(partial(_loss_of_tensors, estimator), stage.parameters(), device)
    surfaces, filling = None, -1
    while stage.step < stage.total:
        due = stage.step * (refills + 1) // stage.total
        if surfaces is None or due > filling:
            surfaces = None  # frees the memory
            surfaces, filling = pool.fill(due), due
            print(f"pool {due}: {len(surfaces):,} views", flush=True)
        stage.set_lr()
        index = torch.randint(0, len(surfaces), (batch,), generator=generator, device=device)
        mirror = torch.rand(batch, generator=generator, device=device) < 0.5
        views = surfaces[index].mirrored(mirror)
        loss = step(*views.tensors(), views.cameras.c2w, views.cameras.fovy)
        stage.descend(loss, batch=batch, log_every=max(1, min(500, steps // 20)))
    averaged: SurfaceEstimator = ema.module
    return averaged


@torch.no_grad()
def evaluate_surface_estimator(estimator: SurfaceEstimator, surfaces: Surfaces) -> dict[str, float]:
    """Mean and median angle between normals in degrees, mean depth error and share of wrong opacities."""
    angles, depths, wrong = [], [], []
    for index in torch.arange(len(surfaces), device=surfaces.image.device).split(128):
        views = surfaces[index]
        estimate = estimator(*views.inputs())
        opacity = views.opacity.float() / 255.0
        covered = opacity > 0.5
        target = functional.normalize(views.normal.float(), dim=-1)
        cosine = (estimate.normal * target).sum(-1).clamp(-1.0, 1.0)
        angles.append(torch.rad2deg(torch.acos(cosine))[covered])
        depths.append((estimate.depth[..., 0] - views.depth.float()).abs()[covered])
        wrong.append(((estimate.opacity[..., 0] > 0.5) != covered).float().flatten())
    angle, depth = torch.cat(angles), torch.cat(depths)
    return {
        "normal_mean_deg": angle.mean().item(),
        "normal_median_deg": angle.median().item(),
        "depth_mean": depth.mean().item(),
        "depth_off": (depth > 0.08).float().mean().item(),
        "opacity_wrong": torch.cat(wrong).mean().item(),
    }
