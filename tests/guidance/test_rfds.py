"""Rectified flow distillation: velocity regression, its couplings, and their NFE."""

from itertools import pairwise

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents, method, prompted

from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import CFGConditions, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.seeding import Rng

M, S = 0.4, 0.6
SCALE = {"guidance_scale": 7.5}


def flow_gradient(prior, z, eps, s, b):
    """v_hat - (eps - z) of a rectified flow at timestep s."""
    x = (1 - s) * z + s * eps
    return guided_prediction(prior, x, torch.full((len(z),), s, dtype=torch.float64), b, 7.5).v - (eps - z)


@pytest.mark.parametrize("kind", ["vp-epsilon", "vp-flow", "rf-v_prediction", "rf-epsilon"])
def test_is_sds_with_the_flow_weight(kind):
    rfds, sds = (method(n, CountingPrior(kind), weighting="flow", **SCALE) for n in ("rfds", "sds"))
    torch.testing.assert_close(gradient(rfds, latents(3), 4), gradient(sds, latents(3), 4), rtol=0, atol=1e-11)
    uniform = method("sds", CountingPrior(kind), weighting="uniform", **SCALE)
    t = torch.tensor(uniform.sample_timesteps(3, 4, Rng()), dtype=torch.float64)
    expected = gradient(uniform, latents(3), 4) / uniform.schedule.alpha(t)[:, None, None, None]
    torch.testing.assert_close(gradient(rfds, latents(3), 4), expected, rtol=0, atol=1e-11 * expected.abs().max())


@pytest.mark.parametrize("s", [0.1, 0.7, 1.0])
def test_is_velocity_regression_on_a_flow_up_to_pure_noise(s):
    prior = CountingPrior("rf-v_prediction")
    guidance = method("rfds", prior, t_min=s, t_max=s, **SCALE)
    z, b = latents(2), prompted(guidance)
    expected = flow_gradient(prior, z, item_noise(Rng(), "noise", 3, z), s, b)
    torch.testing.assert_close(gradient(guidance, z, 3, conditions=b), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("eta", "kind"), [(None, "rf-v_prediction"), (1.0, "rf-v_prediction"), (0.4, "rf-epsilon")])
def test_reverse_moves_the_noise_by_the_unguided_velocity(eta, kind):
    s, prior = 0.6, CountingPrior(kind)
    guidance = method("rfds", prior, coupling="reverse", eta=eta, t_min=s, t_max=s, **SCALE)
    z, b = latents(2), prompted(guidance)
    eps = item_noise(Rng(), "noise", 3, z)
    t = torch.full((2,), s, dtype=torch.float64)
    velocity = prior.predict((1 - s) * z + s * eps, t, b.positive.expand(2)).v
    moved = eps + (1 - s if eta is None else eta) * (velocity + z - eps)
    expected = flow_gradient(prior, z, moved, s, b)
    torch.testing.assert_close(gradient(guidance, z, 3, conditions=b), expected, rtol=0, atol=1e-11)


def test_reverse_at_its_own_rate_takes_the_predicted_noise_on_every_prior():
    prior = CountingPrior()
    guidance = method("rfds", prior, coupling="reverse", **SCALE)
    z, b = latents(3), prompted(guidance)
    context = guidance.begin(z, 0, Rng())
    x_t, _ = guidance.noised(z, context)
    expected = prior.predict(x_t, context.t, b.positive.expand(3)).eps
    torch.testing.assert_close(guidance._coupled_noise(z, b, context), expected)


class Straight(CountingPrior):
    """Prior that knows the noise of the image: it predicts v = eps - z for every input."""

    pair: tuple[torch.Tensor, torch.Tensor]

    def predict(self, x_t, t, conditioning):
        self.rows.append(len(x_t))
        z, eps = self.pair
        return Prediction((eps - z).repeat(len(x_t) // len(z), 1, 1, 1), "v_prediction", x_t, t, self.schedule)


@pytest.mark.parametrize("coupling", ["reverse", "trajectory"])
def test_exact_coupling_leaves_the_noise_alone(coupling):
    prior = Straight("rf-v_prediction")
    guidance = method("rfds", prior, coupling=coupling, coupling_start=0, eta=0.7, **SCALE)
    z, b = latents(2), prompted(guidance)
    context = guidance.begin(z, 3, Rng())
    eps = context.noise(z)
    prior.pair = (z, eps)
    # A trajectory starts at the lowest timestep, s = 0.001, on z's own path without its noise: x_1 = eps - 0.001 eps.
    expected = eps if coupling == "reverse" else eps - 0.001 * eps
    torch.testing.assert_close(guidance._coupled_noise(z, b, context), expected, rtol=0, atol=1e-12)
    if coupling == "reverse":
        assert gradient(guidance, z, 3, conditions=b).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [1, 3])
def test_trajectory_is_unguided_euler_from_the_image_to_the_noise(steps):
    prior = CountingPrior("rf-v_prediction")
    guidance = method(
        "rfds", prior, coupling="trajectory", coupling_start=0, coupling_steps=steps, t_min=0.5, t_max=0.5, **SCALE
    )
    z, b = latents(2), prompted(guidance)
    timesteps = [0.001 + 0.999 * k / steps for k in range(steps + 1)]
    x = (1 - timesteps[0]) * z
    for start, end in pairwise(timesteps):
        t = torch.full((2,), start, dtype=torch.float64)
        x = x + (end - start) * prior.predict(x, t, b.positive.expand(2)).v
    expected = flow_gradient(prior, z, x, 0.5, b)
    first, later = (gradient(guidance, z, step, conditions=b) for step in (0, 5))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-11)
    assert torch.equal(first, later)  # nothing is drawn


def test_trajectory_finds_the_noise_that_the_data_came_from():
    means = torch.full((1, 1, 4, 4), M, dtype=torch.float64)
    one = Mixture(means, torch.full((1, 1, 1, 1), S, dtype=torch.float64), torch.ones(1), (frozenset({"thing"}),))
    z = M + S * torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for schedule in (FlowSchedule(), FlowSchedule(shift=3.0), None):
        prior = GaussianMixturePrior(GaussianMixturePrior.Config(), mixture=one, schedule=schedule)
        b = CFGConditions(prior.embed(["thing"]), prior.embed([""]))
        errors = []
        for steps in (50, 200):
            guidance = method("rfds", prior, coupling="trajectory", coupling_start=0, coupling_steps=steps)
            eps = guidance._coupled_noise(z, b, guidance.begin(z, 0, Rng()))
            # The ODE maps N(m, s^2) at the image to N(alpha m, D) at the noisiest timestep, element by element.
            top = torch.tensor([prior.schedule.timesteps(1)[0]], dtype=torch.float64)
            alpha, sigma = (c.item() for c in prior.schedule.coefficients(top))
            x = alpha * M + (alpha**2 * S**2 + sigma**2) ** 0.5 * (z - M) / S
            errors.append((eps - (x - alpha * z) / sigma).abs().max().item())
        assert errors[1] < 0.4 * errors[0] < 0.4 * 0.2


def test_trajectory_waits_for_its_start():
    coupled = method("rfds", CountingPrior("rf-v_prediction"), coupling="trajectory", coupling_start=4, **SCALE)
    plain = method("rfds", CountingPrior("rf-v_prediction"), **SCALE)
    torch.testing.assert_close(gradient(coupled, latents(2), 3), gradient(plain, latents(2), 3), rtol=0, atol=1e-11)
    assert not torch.allclose(gradient(coupled, latents(2), 4), gradient(plain, latents(2), 4))


def test_random_weight_scales_whole_steps():
    options = {"t_min": 0.5, "t_max": 0.5, **SCALE}
    weighted, plain = (method("rfds", CountingPrior(), random_weight=on, **options) for on in (True, False))
    shares = []
    for step in range(40):
        ratio = gradient(weighted, latents(2), step) / gradient(plain, latents(2), step)
        assert ratio.std() < 1e-9
        shares.append(ratio.mean().item())
    u = torch.tensor(shares, dtype=torch.float64).logit()
    # 40 draws of N(0, 1): standard error of the mean 0.16, of the standard deviation 0.11.
    assert abs(u.mean()) < 4 * 0.16 and abs(u.std() - 1) < 4 * 0.11


@pytest.mark.parametrize(
    ("coupling", "step", "rows"), [("none", 0, 2), ("reverse", 0, 3), ("trajectory", 9, 2), ("trajectory", 10, 5)]
)
def test_cost_counts_the_coupling(coupling, step, rows):
    prior = CountingPrior("rf-v_prediction")
    guidance = method("rfds", prior, coupling=coupling, coupling_start=10)
    b, z = prompted(guidance), latents(2)
    assert guidance.nfe(b, guidance.begin(z, step, Rng())).prior == rows
    gradient(guidance, z, step, conditions=b)
    assert sum(prior.rows) == 2 * rows


def test_reverse_coupling_is_finite_where_nothing_of_the_image_is_left():
    prior = CountingPrior("rf-v_prediction")
    guidance = method("rfds", prior, coupling="reverse", eta=0.4, t_min=1.0, t_max=1.0, **SCALE)
    z, b = latents(2), prompted(guidance)
    eps = item_noise(Rng(), "noise", 3, z)
    velocity = prior.predict(eps, torch.ones(2, dtype=torch.float64), b.positive.expand(2)).v
    moved = eps + 0.4 * (velocity + z - eps)
    expected = flow_gradient(prior, z, moved, 1.0, b)
    torch.testing.assert_close(gradient(guidance, z, 3, conditions=b), expected, rtol=0, atol=1e-11)
