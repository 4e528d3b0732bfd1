"""Adversarial and entropic score distillation: limits equal to VSD, optima on Gaussians, spread over views."""

from dataclasses import replace

import pytest
import torch
from shared.trajectory_cases import ABAR, ddim
from shared.variational_cases import (
    SMALL,
    ExactPhi,
    M,
    S,
    blobs,
    conditions,
    gaussian,
    gradient_of,
    latents,
    same_state,
    state_of,
)
from torch.nn.functional import mse_loss

from scoredist3d import registry
from scoredist3d.cameras import orbit
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance.asd import AdversarialScoreDistillation as ASD
from scoredist3d.guidance.esd import EntropicScoreDistillation as ESD
from scoredist3d.guidance.vsd import VariationalScoreDistillation as VSD
from scoredist3d.priors import CFGConditions, Prediction
from scoredist3d.seeding import Rng


def seen_from_around(prior, batch: int, prompt: str = "red") -> CFGConditions:
    angle, one = torch.arange(batch) * 360.0 / batch, torch.ones(batch)
    return replace(conditions(prior, prompt), cameras=orbit(angle, 20 * one, 3 * one, 40 * one, 8, 8))


def four_steps(guidance) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Gradient of the fourth step, and phi after it; phi depends on the camera from the third step on."""
    z, b = latents(), seen_from_around(guidance.prior, 3)
    gradients = [gradient_of(guidance, z, step, b=b) for step in range(4)]
    return gradients[-1], state_of(guidance.phi)


def counted_evaluations(guidance, b: CFGConditions, z: torch.Tensor) -> dict[str, int]:
    evaluations = {"prior": 0, "own": 0}
    for owner, network in (("prior", guidance.prior), ("own", guidance.phi)):

        def counted(x_t, t, c, owner=owner, predict=network.predict):
            evaluations[owner] += len(x_t)
            return predict(x_t, t, c)

        network.predict = counted
    guidance(z, b, 0, Rng())
    return evaluations


def pushed_away(b: CFGConditions, prior, *texts: tuple[str, float]) -> CFGConditions:
    """CFG conditions with Perp-Neg prompts and weights."""
    return replace(b, negatives=tuple((prior.embed([text]), torch.tensor([weight])) for text, weight in texts))


@pytest.mark.parametrize(
    ("method", "name", "arxiv", "option"),
    [(ASD, "asd", "2312.00739", ("gamma", -0.75)), (ESD, "esd", "2401.00909", ("entropy", 0.5))],
)
def test_are_registered_and_have_only_their_own_options(method, name, arxiv, option):
    entry = registry.lookup("guidance", name)
    assert entry.cls is method and entry.arxiv == arxiv
    assert getattr(parse_component("guidance", {"type": name}), option[0])(0) == option[1]
    with pytest.raises(ValueError, match="gamma_phi"):
        parse_component("guidance", {"type": name, "gamma_phi": 0.5})


@pytest.mark.parametrize(("method", "off"), [(ASD, {"gamma": 0.0}), (ESD, {"entropy": 0.0})])
def test_switched_off_is_vsd(method, off):
    prior = blobs()
    vsd_gradient, vsd_phi = four_steps(VSD(VSD.Config(phi=SMALL), prior=prior))
    gradient, phi = four_steps(method(method.Config(phi=SMALL, **off), prior=prior))
    assert torch.equal(gradient, vsd_gradient) and same_state(phi, vsd_phi)
    gradient, phi = four_steps(method(method.Config(phi=SMALL), prior=prior))
    assert (gradient - vsd_gradient).norm() > 1e-6 * vsd_gradient.norm()  # 7e-5 for ESD, far above rounding


# ASD


class Affine(torch.nn.Module):
    """Network with the output a x_t + b and trainable a and b."""

    def __init__(self, schedule, a: float, b: float, kind: str = "epsilon") -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.a, self.b = (torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))

    def predict(self, x_t, t, conditioning):
        return Prediction(self.a * x_t + self.b, self.kind, x_t, t, self.schedule)


@pytest.mark.parametrize(
    ("kind", "phi_kind", "quirk"),
    [
        ("epsilon", "epsilon", False),
        ("v_prediction", "epsilon", False),
        ("epsilon", "v_prediction", False),
        ("epsilon", "v_prediction", True),
        ("epsilon", "epsilon", True),
    ],
)
@pytest.mark.parametrize("gamma", [-0.75, 0.0, 1.0])
def test_asd_optimum_mixes_the_renders_score_with_the_priors(gamma, kind, phi_kind, quirk):
    """eps_q + share (eps_p - eps_q), share = gamma / (1 + gamma), times alpha^2 for the released code's velocities."""
    prior, mean, std, timestep = gaussian(kind), -0.3, 1.2, 0.4
    guidance = ASD(ASD.Config(phi=SMALL, gamma=gamma, reference_quirk=quirk), prior=prior)
    t = torch.full((20000,), timestep, dtype=torch.float64)
    alpha, sigma = (c[0].item() for c in prior.schedule.coefficients(t))
    # Both scores are affine in x_t: eps = slope (x_t - alpha mean).
    slope_q, slope_p = sigma / (alpha**2 * std**2 + sigma**2), sigma / (alpha**2 * S**2 + sigma**2)
    share = gamma / (1 + gamma) * (alpha**2 if quirk and phi_kind == "v_prediction" else 1.0)
    a = slope_q + share * (slope_p - slope_q)
    b = -alpha * ((1 - share) * slope_q * mean + share * slope_p * M)
    if phi_kind == "v_prediction":  # v = (eps - sigma x_t) / alpha
        a, b = (a - sigma) / alpha, b / alpha
    phi = Affine(prior.schedule, a, b, phi_kind)
    z, eps = mean + std * latents((20000, 1, 2, 2)), latents((20000, 1, 2, 2), seed=6)
    x_t = prior.schedule.add_noise(z, eps, t)

    def slopes(offset: float = 0.0) -> torch.Tensor:
        prediction = Affine(prior.schedule, a + offset, b, phi_kind)
        loss = guidance.phi_loss(prediction.predict(x_t, t, None), z, eps, conditions(prior, ""), 0)
        return torch.stack(torch.autograd.grad(loss, [prediction.a, prediction.b]))

    # Per element the derivative with respect to b is 2 r, r = phi - target + gamma (phi - other target), and x_t times
    # that for a; at the optimum both have mean 0.
    predicted = phi.predict(x_t, t, None).output.detach()
    real = slope_p * (x_t - alpha * M)
    targets = [eps, real]
    if phi_kind == "v_prediction":
        targets = [alpha * eps - sigma * z, alpha * real - sigma * (z if quirk else (x_t - sigma * real) / alpha)]
    residual = 2.0 * (predicted - targets[0] + gamma * (predicted - targets[1]))
    error = torch.stack([(residual * x_t).std(), residual.std()]) / residual.numel() ** 0.5
    assert (slopes().abs() < 4 * error).all()
    assert slopes(0.2)[0] > 10 * error[0] and slopes(-0.2)[0] < -10 * error[0]


def test_asd_enlarges_vsds_gradient_by_one_over_one_plus_gamma():
    prior, mean, std, gamma = gaussian(), -0.3, 1.2, -0.75
    z, b = latents((4, 1, 2, 2)), conditions(prior, "")
    exact = ExactPhi(prior.schedule, mean, std)

    class Discriminator(ExactPhi):
        def predict(self, x_t, t, conditioning):
            renders, real = exact.predict(x_t, t, conditioning).eps, prior.predict(x_t, t, b.positive.expand(4)).eps
            return Prediction((renders + gamma * real) / (1 + gamma), "epsilon", x_t, t, self.schedule)

    gradients = []
    for method, phi in ((VSD, exact), (ASD, Discriminator(prior.schedule, mean, std))):
        guidance = method(method.Config(phi=SMALL, guidance_scale=1.0), prior=prior)
        guidance.phi = phi
        gradients.append(gradient_of(guidance, z, b=b))
    torch.testing.assert_close(gradients[1], 4 * gradients[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("quirk", [False, True])
@pytest.mark.parametrize("phi_kind", ["epsilon", "v_prediction"])
def test_asd_target_is_the_released_codes_up_to_the_image_of_the_velocity(phi_kind, quirk):
    """With the velocity of diffusers: the released code combines the render and the prior's noise prediction."""
    prior, gamma, repeats, weights = blobs(), -0.75, 2, (-0.75, -0.25)
    guidance = ASD(ASD.Config(phi=replace(SMALL, repeats=repeats), gamma=gamma, reference_quirk=quirk), prior=prior)
    b = pushed_away(conditions(prior), prior, ("blue", weights[0]), ("left", weights[1]))
    z, eps = latents().repeat(repeats, 1, 1, 1), latents((6, 3, 8, 8), seed=6)
    k = torch.tensor([50, 400, 900, 3, 620, 777])
    scheduler = ddim(1000)
    x_t, t = scheduler.add_noise(z, eps, k), k.double() / 1000
    output = latents((6, 3, 8, 8), seed=7).requires_grad_()

    e_y, *others = (prior.predict(x_t, t, prior.embed([text]).expand(6)).eps for text in ("red", "blue", "left"))
    real = e_y.clone()
    for weight, e_i in zip(weights, others, strict=True):
        along = (e_i * e_y).sum((1, 2, 3), keepdim=True) / e_y.square().sum((1, 2, 3), keepdim=True)
        real += weight * (e_i - along * e_y)
    targets = [eps, real]
    if phi_kind == "v_prediction":
        image = z
        if not quirk:
            alpha, sigma = (c[k, None, None, None].sqrt() for c in (ABAR, 1.0 - ABAR))
            image = (x_t - sigma * real) / alpha
        targets = [scheduler.get_velocity(z, eps, k), scheduler.get_velocity(image, real, k)]
    expected = mse_loss(output, targets[0]) + gamma * mse_loss(output, targets[1])

    found = guidance.phi_loss(Prediction(output, phi_kind, x_t, t, prior.schedule), z, eps, b, 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(loss, output)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9 * gradients[1].abs().max().item())


def test_asd_rejects_invalid_options():
    with pytest.raises(ValueError, match="gamma"):
        parse_component("guidance", {"type": "asd", "gamma": -1.5})
    assert ASD.Config(phi=replace(SMALL, replay=4)).validate() == ["phi.replay: needs gamma: 0; set phi.replay to 0"]
    assert ASD.Config(phi=replace(SMALL, replay=4), gamma=0.0).validate() == []


@pytest.mark.parametrize("gamma", [-0.75, 0.0])
@pytest.mark.parametrize("negatives", [(), (("blue", -0.5), ("left", -0.3))])
def test_asd_evaluates_the_prior_for_every_training_item(gamma, negatives):
    prior, z = blobs(), latents()
    guidance = ASD(ASD.Config(phi=replace(SMALL, steps=2, repeats=2), gamma=gamma), prior=prior)
    b = pushed_away(seen_from_around(prior, 3), prior, *negatives)
    nfe = guidance.nfe(b, guidance.begin(z, 0, Rng()))
    texts = 1 + len(negatives)
    assert (nfe.prior, nfe.own) == (1 + texts + (4 * texts if gamma else 0), 1 + 4)
    assert counted_evaluations(guidance, b, z) == {"prior": 3 * nfe.prior, "own": 3 * nfe.own}


# ESD


@pytest.mark.parametrize(("entropy", "own"), [(0.0, 2), (0.5, 3), (1.0, 2)])
def test_esd_needs_one_more_evaluation_of_phi_between_the_ends(entropy, own):
    prior, z = blobs(), latents()
    guidance = ESD(ESD.Config(phi=SMALL, entropy=entropy), prior=prior)
    b = seen_from_around(prior, 3)
    assert guidance.nfe(b, guidance.begin(z, 0, Rng())).own == own
    assert counted_evaluations(guidance, b, z) == {"prior": 6, "own": 3 * own}


def test_esd_is_the_papers_formula():
    prior, z, b = blobs(), latents(), seen_from_around(blobs(), 3)
    sharp = latents(seed=8)

    def gradient(entropy: float) -> torch.Tensor:
        guidance = ESD(ESD.Config(phi=SMALL, entropy=entropy), prior=prior)
        guidance.phi = ExactPhi(prior.schedule, 0.0, 1.0, dirac=sharp)
        return gradient_of(guidance, z, b=b)

    guidance = ESD(ESD.Config(phi=SMALL), prior=prior)
    step = guidance.begin(z, 0, Rng())
    x_t, _ = guidance.noised(z, step)
    eps = guidance.guided(x_t, b, step).eps
    alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(step.t))
    blind, aware = sigma * x_t, (x_t - alpha * sharp) / sigma  # N(0, 1), where alpha^2 + sigma^2 = 1, and a point
    for entropy in (0.0, 0.3, 1.0):
        expected = sigma**2 * (eps - entropy * blind - (1 - entropy) * aware)
        torch.testing.assert_close(gradient(entropy), expected, rtol=0, atol=1e-10)


def test_views_keep_the_priors_spread_only_with_their_entropy():
    """One scene with 32 views: given the camera the image is certain, without it the images form a distribution."""
    prior, ends = gaussian(), {}
    b = seen_from_around(prior, 32, "")
    for entropy in (0.0, 1.0):
        guidance = ESD(ESD.Config(phi=SMALL, entropy=entropy, guidance_scale=1.0, weighting="lambda"), prior=prior)
        phi = guidance.phi = ExactPhi(prior.schedule, 0.0, 1.0)
        z = 2.0 * latents((32, 1, 2, 2))
        for step in range(150):
            phi.mean, phi.std, phi.dirac = z.mean(), z.std(correction=0), z
            z = z - 0.5 * 20.0 ** (-step / 150) * gradient_of(guidance, z, step, Rng(1), b)
        ends[entropy] = z
    assert abs(ends[1.0].mean() - M) < 0.02 and abs(ends[1.0].std(correction=0) - S) < 0.02
    assert abs(ends[0.0].mean() - M) < 0.02 and ends[0.0].std() < 0.1 * S
