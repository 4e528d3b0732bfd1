"""Consistency distillation sampling against the authors' variance-exploding form and a Gaussian."""

import pytest
import torch
from shared.method_cases import CountingPrior, PairPrior, gradient, latents, prompted, views
from shared.trajectory_cases import M, S, coefficients, empty, gaussian

from scoredist3d.guidance.consistent3d import ConsistencyDistillationSampling as CDS
from scoredist3d.priors import CFGConditions, guided_prediction
from scoredist3d.seeding import Rng


def cds(prior, **options) -> CDS:
    return CDS(CDS.Config(**{"grad_clip": None, **options}), prior=prior)


def at(timestep: float, **options) -> dict:
    return {"t_min": timestep, "t_max": timestep, **options}


def red(prior) -> CFGConditions:
    return CFGConditions(prior.embed(["red"]), prior.embed([""]))


class Exploding:
    """The authors' code: y = z + lambda n, the network sees y / sqrt(1 + lambda^2)."""

    def __init__(self, prior, b: CFGConditions, scale: float) -> None:
        self.prior, self.b, self.scale = prior, b, scale

    def ratio(self, timestep: float) -> float:
        alpha, sigma = coefficients(timestep)
        return sigma / alpha

    def predictions(self, y: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Guided prediction, and the prediction under the prompt."""
        t = torch.full((len(y),), timestep, dtype=torch.float64)
        x = y / (1 + self.ratio(timestep) ** 2) ** 0.5
        return tuple(guided_prediction(self.prior, x, t, self.b, scale).eps for scale in (self.scale, 1.0))

    def rescaled(self, y, timestep: float, guided, prompted_, share: float):
        """Noise prediction that corresponds to the rescaled image."""
        image, plain = (y - self.ratio(timestep) * e for e in (guided, prompted_))
        factor = plain.std((1, 2, 3), keepdim=True) / image.std((1, 2, 3), keepdim=True)
        image = share * image * factor + (1 - share) * image
        return (y - image) / self.ratio(timestep)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gradient_is_the_released_codes(share):
    prior = CountingPrior()
    guidance = cds(prior, guidance_scale=7.5, guidance_rescale=share, interval=(0.2, 0.2), **at(0.4))
    z, b = latents(2), red(prior)
    noise = guidance.begin(z, 3, Rng(), particles=(0, 1)).particle_noise(z, "noise")
    code = Exploding(prior, b, 7.5)
    above, below = code.ratio(0.6), code.ratio(0.4)
    y_t = z + above * noise
    e1, e1_prompt = code.predictions(y_t, 0.6)
    bent = code.rescaled(y_t, 0.6, e1, e1_prompt, share)
    y_s = y_t + (below - above) * bent
    e2, _ = code.predictions(y_s, 0.4)
    step = above / below * (bent - e1) + (e2 - bent)  # what the code adds to the latents
    ours = gradient(guidance, z, 3, conditions=b)
    torch.testing.assert_close(ours, -step, rtol=0, atol=1e-10 * ours.abs().max().item())
    # In images: the difference of both predictions over lambda_s.
    images = [y - ratio * e for y, ratio, e in ((y_t, above, e1), (y_s, below, e2))]
    torch.testing.assert_close(ours, (images[1] - images[0]) / below, rtol=0, atol=1e-10 * ours.abs().max().item())


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.3), (0.5, 0.6), (0.68, 0.98)])
def test_gaussian_data(low, high):
    # e = l y / (S^2 + l^2) for y = z - M + l n, so e_t - e_s = y_t S^2 (l_t - l_s) / ((S^2 + l_t^2) (S^2 + l_s^2)).
    prior = gaussian()
    guidance = cds(prior, guidance_scale=1.0, interval=(high - low, high - low), **at(low))
    z = torch.tensor([-2.0, -0.5, 1.0, 1.5], dtype=torch.float64).reshape(1, 1, 2, 2)
    noise = guidance.begin(z, 0, Rng(), particles=range(len(z))).particle_noise(z, "noise")
    (below, above) = (sigma / alpha for alpha, sigma in (coefficients(low), coefficients(high)))
    factor = S**2 * (above - below) / ((S**2 + above**2) * (S**2 + below**2))
    ours = gradient(guidance, z, conditions=empty(prior))
    torch.testing.assert_close(ours, factor * (z - M + above * noise), rtol=1e-9, atol=1e-12)


def test_flow_priors_take_an_euler_step():
    prior = CountingPrior("rf-v_prediction")
    guidance = cds(prior, guidance_scale=3.0, interval=(0.3, 0.3), **at(0.4))
    z, b = latents(2), red(prior)
    noise = guidance.begin(z, 0, Rng(), particles=range(len(z))).particle_noise(z, "noise")
    t, s = (torch.full((2,), timestep, dtype=torch.float64) for timestep in (0.7, 0.4))
    x_t = 0.3 * z + 0.7 * noise
    v = guided_prediction(prior, x_t, t, b, 3.0).v
    x_s = x_t - 0.3 * v
    expected = x_t + 0.3 * v - (x_s + 0.6 * guided_prediction(prior, x_s, s, b, 3.0).v)
    torch.testing.assert_close(gradient(guidance, z, conditions=b), expected, rtol=0, atol=1e-10)


def test_one_noise_for_the_particles_whole_run():
    prior = CountingPrior()
    z, b = latents(1).expand(2, -1, -1, -1), red(prior)
    pinned = at(0.4, interval=(0.2, 0.2), guidance_scale=7.5)
    fixed, fresh = (cds(prior, fixed_noise=choice, **pinned) for choice in (True, False))
    one = gradient(fixed, z, 0, conditions=b, particles=(3, 3))
    assert torch.equal(one, gradient(fixed, z, 8, conditions=b, particles=(3, 3)))
    torch.testing.assert_close(one[0], one[1], rtol=0, atol=1e-11)
    assert not torch.allclose(one[1], gradient(fixed, z, 0, conditions=b, particles=(3, 4))[1])
    assert not torch.allclose(gradient(fresh, z, 0, conditions=b), gradient(fresh, z, 8, conditions=b))


def test_timesteps_follow_the_released_schedule():
    guidance = CDS(CDS.Config(), prior=CountingPrior())
    for step, expected in ((0, 0.7), (750, 0.4), (3000, 0.1), (9000, 0.1)):
        above, below = guidance.interval_timesteps(guidance.begin(latents(200), step, Rng()))
        assert below == [pytest.approx(expected, abs=5.1e-4)] * 200
        gaps = [a - b for a, b in zip(above, below, strict=True)]
        # 0.7 + 0.3 would pass the limit. Uniform on 0.1, 0.101, ..., 0.299: standard error of the mean 0.0041.
        assert max(above) <= 0.98 and min(gaps) >= 0.1 - 1e-9 and max(gaps) < 0.3
        assert step == 0 or abs(sum(gaps) / 200 - 0.1995) < 4 * 0.0041
    assert guidance.config.grad_clip(1500) == 5.0 and guidance.config.guidance_scale(1500) == 76.0
    top = cds(CountingPrior(), **at(1.0))
    above, below = top.interval_timesteps(top.begin(latents(3), 0, Rng()))
    assert above == [0.98] * 3 and below == [0.88] * 3


def test_views_seen_jointly_share_the_interval():
    guidance = cds(PairPrior())
    above, _ = guidance.interval_timesteps(guidance.begin(latents(4), 0, Rng()))
    assert above[0] == above[1] != above[2] == above[3]


@pytest.mark.parametrize(("perp_neg", "rows"), [(False, 2), (True, 4)])
@pytest.mark.parametrize(("share", "predictions"), [(0.0, 2), (0.5, 3)])
def test_nfe(perp_neg, rows, share, predictions):
    prior = CountingPrior()
    guidance = cds(prior, guidance_scale=7.5, guidance_rescale=share)
    b = prompted(guidance, cameras=views(3), perp_neg=perp_neg)
    gradient(guidance, latents(3), conditions=b)
    assert prior.rows == [3 * rows] * predictions
    assert guidance.nfe(b, guidance.begin(latents(3), 0, Rng())).prior == predictions * rows


def test_impossible_intervals_are_named():
    assert CDS.Config().validate() == []
    assert CDS.Config(interval=(0.3, 0.1)).validate() == ["interval: 0.3 is above 0.1; give the shorter interval first"]
    assert CDS.Config(interval=(0.5, 0.6), t_limit=0.4).validate() == [
        "interval: 0.5 must be below t_limit 0.4; lower it or raise t_limit"
    ]
