"""HiFA: regression to an image that is denoised in a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.config import FieldError, Schedule, option
from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.base import Guidance
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.core.image_space import resized, with_image_term
from scoredist3d.guidance.core.outputs import NFE, Score
from scoredist3d.guidance.core.stored_targets import StoredTargets
from scoredist3d.guidance.core.surface_term import SurfaceTerm
from scoredist3d.guidance.core.timesteps import timestep_tensor
from scoredist3d.guidance.core.weighting import Weighting, regression_weight
from scoredist3d.meshes.space_carving import DepthEstimates
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.procedural.surface_estimator import SurfaceEstimate
from scoredist3d.registry import register
from scoredist3d.seeding import Rng


@register(
    "guidance",
    "hifa",
    summary="Regress latents and pixels to an image that is denoised in a few steps.",
    arxiv="2305.18766",
)
class HiFA(Guidance):
    """HiFA: the gradient of c/2 ||z - z_hat||^2 + lambda_rgb c/2 ||x - decode(z_hat)||^2 with a constant target z_hat.

    z_hat is x_t denoised completely in a few stochastic DDIM steps (eta 1) with classifier-free guidance; SDS predicts
    it in one step. With one step the latent term is SDS: c = w(t) alpha / sigma of the configured ``weighting``, where
    ``lambda`` gives the constant c of the paper and ``uniform`` its "noisematch". The paper anneals one timestep for
    all items, t = t_max - (t_max - t_min) sqrt(step / N): set t_min and t_max to the same schedule of shape ``sqrt``.

    The authors' code takes strides of 1 / denoise_steps of the whole chain, hence fewer steps at lower timesteps; here
    the number of steps is the same at every timestep. The depth and z-variance terms of the paper are losses of the
    scene.

    With ``update_every`` above 1, the decoded target of a view is kept for that many steps (iterative dataset update,
    arXiv 2303.12789). The steps between two updates neither encode renders nor evaluate the prior. A render is compared
    with its target over the background of the render from which the target was made. With several devices, the targets
    of all ranks but the first are made again when a run is resumed. ``normal_weight`` and ``depth_weight`` compare the
    normals and depths of a render with those that a network estimates from its kept target; see
    :class:`~scoredist3d.guidance.core.surface_term.SurfaceTerm`. ``carve_steps`` removes the matter in front of these
    depths from the surface.
    """

    @dataclass
    class Config(Guidance.Config):
        """Options of HiFA."""

        weight: Schedule = option(0.05, "Weight of both terms, w in the paper.", ge=0)
        guidance_scale: Schedule = option(100.0, "Guidance scale gamma in eps_u + gamma (eps_c - eps_u).")
        weighting: Weighting = option(
            "lambda",
            "Weight c(t) of both terms. lambda: 1 (the paper's constant); uniform: alpha/sigma (its noisematch); sds: "
            "alpha sigma; fantasia3d: alpha^2 sigma; flow: 1/sigma.",
        )
        latent_weight: Schedule = option(1.0, "Weight of the latent term.", ge=0)
        image_weight: Schedule = option(
            0.1,
            "Weight lambda_rgb of the image term, which acts on the render, or through the decoder if latents are "
            "optimized.",
            ge=0,
        )
        denoise_steps: int = option(4, "Number of DDIM steps from x_t to the target.", ge=1)
        eta: float = option(1.0, "Amount of fresh noise in the denoising steps: 1 as in DDPM, 0 for none.", ge=0, le=1)
        update_every: int = option(
            1,
            "Steps for which the target image of a view is kept; more than 1 needs latent_weight: 0, and a number of "
            "different views that is limited by data.num_views.",
            ge=1,
        )

        normal_weight: Schedule = option(
            0.0, "Weight per pixel of the normals that are estimated from kept targets; needs update_every.", ge=0
        )
        depth_weight: Schedule = option(
            0.0, "Weight per pixel of the depths that are estimated from kept targets; needs update_every.", ge=0
        )
        carve_steps: list[int] = option(
            [],
            "Steps before which a grid surface (dmtet, flexicubes) loses all matter through which several kept targets "
            "see, by their estimated depths: this opens cavities, such as the inside of a mug, at once. Needs "
            "normal_weight or depth_weight; give every view a target first.",
            ge=1,
        )
        surface_estimator: str = option(
            "embedded",
            "Network that estimates normals and depths: embedded, for images of the embedded prior, or a folder "
            "written by scripts/train_surface_estimator.py.",
        )

        @property
        def estimates_surface(self) -> bool:
            """Whether normals or depths are estimated."""
            zero = Schedule.constant(0.0)
            return self.normal_weight != zero or self.depth_weight != zero

        def maps(self) -> frozenset[str]:
            """The normals, if normals or depths are estimated."""
            return frozenset({"normal"} if self.estimates_surface else ())

        @property
        def carves(self) -> bool:
            """Whether there are steps with space carving."""
            return bool(self.carve_steps)

        def validate(self) -> list[str]:
            """Check that kept targets are used by the image term alone, and estimates with kept targets."""
            problems = super().validate()
            if self.estimates_surface and self.update_every == 1:
                problems.append(
                    "update_every: normals and depths are estimated from kept targets; set update_every above 1, or "
                    "normal_weight and depth_weight to 0"
                )
            if self.carve_steps and not self.estimates_surface:
                problems.append(
                    "carve_steps: needs estimated depths; set normal_weight or depth_weight above 0, or set it to []"
                )
            if self.update_every > 1 and self.latent_weight != Schedule.constant(0.0):
                problems.append(
                    "update_every: the latent term needs a new target at every step; set latent_weight to 0, or "
                    "update_every to 1"
                )
            return problems

    config: Config

    def __init__(self, config: Config, *, prior: Prior, rng: Rng | None = None) -> None:
        super().__init__(config, prior=prior, rng=rng)
        self._surface = SurfaceTerm(config.surface_estimator) if config.estimates_surface else None
        channels = SurfaceTerm.CHANNELS if config.estimates_surface else 0
        self.stored = StoredTargets(config.update_every, channels) if config.update_every > 1 else None

    def score_gradient(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Latent gradient c (z - z_hat) and the gradient of the image term."""
        if self.stored is not None:
            return self._stored_score(self.stored, z, conditions, ctx)
        target = self.target(self.noised(z, ctx)[0], conditions, ctx)
        c = regression_weight(self.config.weighting, self.schedule, ctx.t)
        score = Score(self._value("latent_weight", ctx.step) * per_item(c, z) * (z - target))
        image_weight = self._value("image_weight", ctx.step)
        return with_image_term(score, self.prior, z, target, ctx, self.config.weighting, image_weight)

    def _stored_score(self, stored: StoredTargets, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Score:
        """Gradient of the image term for targets that are kept; outdated ones are replaced first.

        The render over the background b' of its target is x + (1 - opacity) (b' - b), so the opacity has a gradient of
        its own.

        Raises:
            FieldError: The step has no render of a scene.
        """
        if ctx.rgb is None or ctx.opacity is None or ctx.background is None or conditions.cameras is None:
            raise FieldError("targets are kept only for renders of a 3D scene; set it to 1", "update_every")
        rgb, background = ctx.rgb.detach(), ctx.background
        keys = stored.keys(ctx.particles, conditions.cameras)
        if stored.outdated(keys, ctx.step):
            images = self.target_images(z, conditions, ctx)
            surface = None if self._surface is None else self.target_surface(images, conditions, ctx)
            stored.put(ctx.particles, conditions.cameras, ctx.step, images, background.detach(), surface)
        images, behind, surface = stored.get(keys)
        images, behind = resized(images.to(rgb), rgb), resized(behind.to(rgb), rgb)
        change = behind - background.detach()
        weight = self._value("image_weight", ctx.step) * regression_weight(self.config.weighting, self.schedule, ctx.t)
        gradient = per_item(weight, rgb) * (rgb + (1.0 - ctx.opacity.detach()) * change - images)
        by_opacity = -(gradient * change).sum(-1, keepdim=True)
        score = Score(torch.zeros_like(z), gradient, opacity_gradient=by_opacity)
        return score if self._surface is None else self._with_surface_term(self._surface, score, surface, ctx)

    def _with_surface_term(self, term: SurfaceTerm, score: Score, surface: Tensor, ctx: StepContext) -> Score:
        """The score with the gradients of the normals and depths."""
        if ctx.normal is None or ctx.depth is None or ctx.opacity is None:
            raise FieldError(
                "needs renders of a 3D scene with normals and depths; set it and depth_weight to 0", "normal_weight"
            )
        c = regression_weight(self.config.weighting, self.schedule, ctx.t)[:, None, None]
        by_normal, by_depth = term.gradients(
            surface,
            ctx.normal,
            ctx.depth,
            ctx.opacity,
            normal_weight=self._value("normal_weight", ctx.step) * c,
            depth_weight=self._value("depth_weight", ctx.step) * c,
        )
        return replace(score, normal_gradient=by_normal, depth_gradient=by_depth)

    def reads_latents(self, step: int, cameras: Cameras, particles: Sequence[int]) -> bool:
        """Whether the step makes new targets."""
        return self.stored is None or self.stored.outdated(self.stored.keys(particles, cameras), step)

    def carves_at(self, step: int) -> bool:
        """Whether the step is one of ``carve_steps``."""
        return step in self.config.carve_steps

    def depth_estimates(self, particle: int) -> DepthEstimates | None:
        """Depths estimated from the kept targets of a particle."""
        found = None if self.stored is None or self._surface is None else self.stored.maps(particle)
        if found is None:
            return None
        cameras, maps = found
        surface = SurfaceEstimate.unpacked(maps.float())
        return DepthEstimates(cameras, surface.depth[..., 0], surface.depth_error[..., 0], surface.opacity[..., 0])

    def target_images(self, z: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Target images (B, H, W, 3) in [0, 1] that are kept, over the backgrounds of the renders."""
        target = self.target(self.noised(z, ctx)[0], conditions, ctx)
        return self.prior.decode(target).clamp(0.0, 1.0)

    def target_surface(self, images: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Normals and depths estimated from target images, one map (B, H, W, 7); see :class:`SurfaceTerm`."""
        assert self._surface is not None and ctx.background is not None and conditions.cameras is not None
        return self._surface.estimate(images, ctx.background.detach(), conditions.cameras)

    def target(self, x_t: Tensor, conditions: CFGConditions, ctx: StepContext) -> Tensor:
        """Target z_hat (B, C, h, w): every item denoised from its own timestep, all in one batch."""
        trajectories = [
            self.schedule.timesteps(self.config.denoise_steps, start=timestep) for timestep in ctx.timesteps
        ]
        columns = [timestep_tensor(timesteps, x_t) for timesteps in zip(*trajectories, strict=True)]
        for index, (t, s) in enumerate(pairwise(columns[:-1])):
            prediction = self.guided(x_t, conditions, ctx, t=t)
            noise = ctx.noise(x_t, f"hifa/{index}") if self.config.eta > 0.0 else None
            x_t = self.schedule.ddim_step(prediction.eps, prediction.x0, t, s, eta=self.config.eta, noise=noise)
        return self.guided(x_t, conditions, ctx, t=columns[-2]).x0

    def nfe(self, conditions: CFGConditions, ctx: StepContext) -> NFE:
        """One guided prediction per denoising step; none while the targets of all views are kept."""
        cameras = conditions.cameras
        if cameras is not None and not self.reads_latents(ctx.step, cameras, ctx.particles):
            return NFE(0)
        return NFE(self.config.denoise_steps * super().nfe(conditions, ctx).prior)
