"""Collaborative score distillation: limits and identities of the kernel, and Stein variational descent on Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoredist3d import registry
from scoredist3d.guidance.collaborative import CollaborativeScoreDistillation, stein_kernel
from scoredist3d.guidance.core.context import StepContext
from scoredist3d.guidance.sds import ScoreDistillationSampling
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.seeding import Rng

M, S = 0.4, 0.6


def blobs(parametrization: str = "epsilon") -> GaussianMixturePrior:
    return GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8, std=0.5, parametrization=parametrization))


def gaussian() -> GaussianMixturePrior:
    """One pixel of one channel."""
    one = Mixture(
        torch.full((1, 1, 1, 1), M, dtype=torch.float64),
        torch.full((1, 1, 1, 1), S, dtype=torch.float64),
        torch.ones(1),
        (frozenset({"thing"}),),
    )
    return GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=one)


def latents(count: int = 4, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditions(prior) -> CFGConditions:
    return CFGConditions(prior.embed(["red"]), prior.embed([""]))


def collaborative(prior, **options) -> CollaborativeScoreDistillation:
    config = CollaborativeScoreDistillation.Config(**{"guidance_scale": 7.5, **options})
    return CollaborativeScoreDistillation(config, prior=prior)


def gradient_of(guidance, z: Tensor, step: int = 0, b: CFGConditions | None = None) -> Tensor:
    z = z.clone().requires_grad_()
    guidance(z, b or conditions(guidance.prior), step, Rng()).loss.backward()
    return z.grad * len(z)


def directions(guidance, z: Tensor, step: int = 0) -> tuple[Tensor, Tensor, StepContext]:
    """w (eps_hat - eps) of every item, x_t, and the context of the step, for independent noise."""
    context = guidance.begin(z, step, Rng())
    x_t, eps = guidance.noised(z, context)
    with torch.no_grad():
        return guidance.weighted(guidance.guided(x_t, conditions(guidance.prior), context), z, eps), x_t, context


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def test_is_registered_with_its_paper():
    entry = registry.lookup("guidance", "collaborative-sd")
    assert entry.cls is CollaborativeScoreDistillation and entry.arxiv == "2307.04787"


@pytest.mark.parametrize("weighting", ["sds", "lambda"])
@pytest.mark.parametrize("noise_sharing", ["independent", "shared"])
def test_one_item_is_sds(weighting, noise_sharing):
    prior, z = blobs(), latents(1)
    options = {"guidance_scale": 7.5, "weighting": weighting}
    sds = ScoreDistillationSampling(ScoreDistillationSampling.Config(**options), prior=prior)
    close(
        gradient_of(collaborative(prior, noise_sharing=noise_sharing, **options), z, 3), gradient_of(sds, z, 3), 1e-12
    )


@pytest.mark.parametrize("scale", [0, 1, "sigma"])
def test_gradient_is_the_papers_formula_with_the_codes_sign(scale):
    prior, z = blobs("v_prediction"), latents()
    guidance = collaborative(prior, repulsion_scale=scale)
    direction, x, context = directions(guidance, z)
    assert len(set(context.timesteps)) == 1
    sigma = prior.schedule.sigma(context.t)[0].item()
    squared = (x[:, None] - x[None]).square().flatten(2).sum(-1)
    pairs = sorted(squared[i, j].item() for i in range(4) for j in range(i))
    h = pairs[2] / math.log(5)  # the lower of the two middle ones of six, as torch.median takes it
    expected = torch.zeros_like(z)
    for i in range(4):
        for j in range(4):
            k = math.exp(-squared[i, j].item() / h)
            repulsion = -(2 / h) * k * (x[i] - x[j])
            expected[i] += k * direction[j] + sigma**2 * {0: 0.0, 1: 1.0, "sigma": sigma}[scale] * repulsion
    close(gradient_of(guidance, z), expected / 4)


def test_repulsion_is_the_gradient_of_the_kernels_sum():
    x = latents().requires_grad_()
    h = 40.0
    for i in range(4):
        to_others = torch.exp(-(x[i] - x.detach()).square().flatten(1).sum(1) / h).sum()
        (gradient,) = torch.autograd.grad(to_others, x)
        close(stein_kernel(x.detach(), h)[1][i], gradient[i])


def test_kernel_is_symmetric_with_unit_diagonal_and_repulsion_sums_to_zero():
    kernel, repulsion, h = stein_kernel(latents(7))
    close(kernel, kernel.T, 1e-14)
    close(kernel.diagonal(), torch.ones(7, dtype=torch.float64), 1e-14)
    close(repulsion.sum(0), torch.zeros(3, 8, 8, dtype=torch.float64), 1e-13)
    assert kernel.min() > 0 and repulsion.abs().max() > 1e-3 and h.ndim == 0
    pair = stein_kernel(latents(2))[1]
    close(pair[0], -pair[1], 1e-14)


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_equal_distances_give_one_over_n_plus_one(count):
    corners = torch.eye(count, dtype=torch.float64)[:, :, None, None] * 3.0
    kernel = stein_kernel(corners)[0]
    off = kernel[~torch.eye(count, dtype=torch.bool)]
    close(off, torch.full_like(off, 1.0 / (count + 1)), 1e-14)


def test_scaling_the_points_keeps_the_kernel_and_shrinks_the_repulsion():
    x = latents()
    kernel, repulsion, _ = stein_kernel(x)
    scaled, weaker, _ = stein_kernel(3.0 * x)
    close(scaled, kernel)
    close(weaker, repulsion / 3.0)


def test_half_precision_distances_are_computed_in_full():
    x = latents().half()
    kernel, repulsion, _ = stein_kernel(400.0 * x)  # squares of 400 overflow fp16
    exact = stein_kernel((400.0 * x).double())
    assert kernel.dtype == repulsion.dtype == torch.float32
    torch.testing.assert_close(kernel.double(), exact[0], rtol=1e-5, atol=1e-6)
    assert gradient_of(collaborative(blobs()), latents().float()).dtype == torch.float32


def test_identical_items_move_alike():
    prior, z = blobs(), latents(1).expand(3, -1, -1, -1)
    for dtype in (torch.float64, torch.float32):
        kernel, repulsion, _ = stein_kernel(z.to(dtype))
        assert torch.equal(kernel, torch.ones(3, 3, dtype=dtype)) and not repulsion.any()
        shared = gradient_of(collaborative(prior, noise_sharing="shared"), z.to(dtype))
        sds = ScoreDistillationSampling(ScoreDistillationSampling.Config(guidance_scale=7.5), prior=prior)
        alone = gradient_of(sds, z[:1].to(dtype))  # shared noise is the first item's
        close(shared, alone.expand_as(shared), 1e-12 if dtype == torch.float64 else 1e-5)


def test_narrow_and_wide_kernels_are_independent_and_averaged_sds():
    prior, z = blobs(), latents()
    direction = directions(collaborative(prior), z)[0]
    close(gradient_of(collaborative(prior, bandwidth=1e-6), z), direction / 4)
    wide = collaborative(prior, bandwidth=1e15)
    close(gradient_of(wide, z), direction.mean(0).expand_as(z), 1e-10)


def test_permuting_the_items_permutes_the_gradient():
    class Reordered(StepContext):
        """Noise that moves with its item."""

        order: Tensor

        def noise(self, like: Tensor, stream: str = "noise") -> Tensor:
            return super().noise(like, stream)[self.order]

    prior, z, order = blobs(), latents(), torch.tensor([2, 0, 3, 1])
    guidance = collaborative(prior)
    context = guidance.begin(z, 0, Rng())
    other = Reordered(**vars(context))
    object.__setattr__(other, "order", order)
    with torch.no_grad():
        here = guidance.score_gradient(z, conditions(prior), context).gradient
        there = guidance.score_gradient(z[order], conditions(prior), other).gradient
    close(there, here[order])
    assert not torch.allclose(here[order], here)


@pytest.mark.parametrize("space", ["xt", "z"])
def test_repulsion_spreads_the_items_out(space):
    """The difference of the two gradients is the repulsion; a descent step along it increases the spread."""
    prior, z = blobs(), latents(8)
    options = {"kernel_space": space, "noise_sharing": "shared", "t_min": 0.5, "t_max": 0.5}
    repulsion = gradient_of(collaborative(prior, **options), z) - gradient_of(
        collaborative(prior, repulsion_scale=0, **options), z
    )
    assert repulsion.abs().max() > 1e-4
    moved = z - 0.1 * repulsion
    assert (moved - moved.mean(0)).square().sum() > (z - z.mean(0)).square().sum()
    close(moved.mean(0), z.mean(0))


def test_shared_noise_lets_the_kernel_see_the_images_and_independent_noise_hides_them():
    """Two pairs of close items: with independent noise each item is about equally far from all others."""
    z = 0.3 * latents(2).repeat_interleave(2, 0)
    z[::2] += 0.01
    timesteps = {"t_min": 0.9, "t_max": 0.9}
    prior = blobs()
    kernels = {}
    for name, options in {
        "independent": {},
        "shared": {"noise_sharing": "shared"},
        "z": {"kernel_space": "z"},
    }.items():
        guidance = collaborative(prior, **timesteps, **options)
        output = guidance(z.clone().requires_grad_(), conditions(prior), 0, Rng())
        kernels[name] = output.diagnostics["kernel"].item()
    assert kernels["independent"] == pytest.approx(1 / 5, abs=0.03)
    # Two of six pairs coincide (k near 1), the median is the distance of the others: k = 1/5.
    for name in ("shared", "z"):
        assert kernels[name] == pytest.approx((2 + 4 / 5) / 6, abs=0.02)


def test_items_keep_their_own_prompts():
    prior, z = blobs(), latents(2)
    b = CFGConditions(prior.embed(["red", "blue"]), prior.embed([""]))
    guidance = collaborative(prior, repulsion_scale=0, bandwidth=1e-6)
    close(gradient_of(guidance, z, b=b)[:1], gradient_of(guidance, z)[:1])
    assert not torch.allclose(gradient_of(guidance, z, b=b)[1:], gradient_of(guidance, z)[1:])


class Quiet(StepContext):
    """Gradient without noise, which is the mean over the noise for Gaussian data and a kernel independent of it."""

    def noise(self, like: Tensor, stream: str = "noise") -> Tensor:
        return torch.zeros_like(like)


def settled(count: int, timestep: float, **options) -> Tensor:
    """Fixed point of ``count`` particles under the mean gradient at one timestep."""
    prior = gaussian()
    options = {"noise_sharing": "shared", "weighting": "uniform", "t_min": timestep, "t_max": timestep, **options}
    guidance = collaborative(prior, guidance_scale=0.0, **options)
    z = M + 0.3 * torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    context = Quiet(**vars(guidance.begin(z, 0, Rng())))
    b = CFGConditions(prior.embed([""]), prior.embed([""]))
    velocity = torch.zeros_like(z)
    with torch.no_grad():
        for _ in range(300):
            velocity = 0.8 * velocity - 0.5 * guidance.score_gradient(z, b, context).gradient
            z = z + velocity
        still = guidance.score_gradient(z, b, context).gradient.abs().max()
    assert still < 5e-4
    return z


@pytest.mark.parametrize("space", ["xt", "z"])
def test_exact_stein_descent_keeps_mean_and_variance_of_the_data(space):
    """The fixed point of alpha z under the score of p_t is p_t itself, of variance s^2 + (sigma / alpha)^2 in z.

    N particles with a finite kernel are narrower; the error decreases as N grows.
    """
    timestep = 0.3
    t = torch.tensor([timestep], dtype=torch.float64)
    target = S**2 + gaussian().schedule.lambda_(t).item() ** 2
    errors = []
    for count in (4, 16, 64):
        z = settled(count, timestep, repulsion_scale="sigma", kernel_space=space)
        assert z.mean().item() == pytest.approx(M, abs=0.02)
        errors.append(abs(z.var(correction=0).item() / target - 1.0))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1


def test_without_repulsion_all_particles_collapse_to_the_mean():
    z = settled(16, 0.3, repulsion_scale=0)
    assert z.std() < 0.01 * S and z.mean().item() == pytest.approx(M, abs=1e-3)


def test_subtracting_independent_noise_adds_sigma_times_the_repulsion():
    """Stein's identity, E[k(x_j, x_i) eps_j] = sigma E[grad_{x_j} k]: -sum_j k_ij eps_j is sigma R_i on average.

    20000 draws for three particles; standard errors from the draws.
    """
    sigma, bandwidth = 0.8, 2.0
    z = torch.tensor([-1.0, 0.2, 0.9], dtype=torch.float64)
    eps = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel, repulsion, _ = torch.vmap(lambda points: stein_kernel(points, bandwidth))(
        (0.6 * z + sigma * eps)[..., None]
    )
    from_noise, explicit = -(kernel @ eps[..., None])[..., 0], sigma * repulsion[..., 0]
    error = (from_noise - explicit).std(0) / len(eps) ** 0.5
    assert ((from_noise - explicit).mean(0).abs() < 4 * error).all()
    assert (from_noise.mean(0).abs() > 8 * error)[[0, 2]].all()


def test_timesteps_are_shared_and_nfe_is_that_of_sds():
    prior = blobs()
    guidance = collaborative(prior)
    timesteps = guidance.sample_timesteps(5, 3, Rng())
    sds = ScoreDistillationSampling(ScoreDistillationSampling.Config(), prior=prior)
    assert timesteps == sds.sample_timesteps(1, 3, Rng()) * 5
    calls: list[int] = []
    predict = prior.predict
    prior.predict = lambda x_t, t, c: calls.append(len(x_t)) or predict(x_t, t, c)
    for scale, rows in ((7.5, 2), (1.0, 1), (0.0, 1)):
        calls.clear()
        guidance = collaborative(prior, guidance_scale=scale)
        gradient_of(guidance, latents())
        nfe = guidance.nfe(conditions(prior), guidance.begin(latents(), 0, Rng()))
        assert calls == [4 * rows] and (nfe.prior, nfe.own) == (rows, 0)


@pytest.mark.parametrize("other", ["sample", "v_prediction"])
def test_every_parametrisation_gives_the_same_gradient(other):
    a, b = (gradient_of(collaborative(blobs(kind)), latents()) for kind in ("epsilon", other))
    close(a, b, 1e-10)
