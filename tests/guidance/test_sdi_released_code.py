"""SDI with ``reference_quirk`` against the steps of the released code, which uses diffusers' schedulers."""

from itertools import pairwise

import pytest
import torch
from shared.method_cases import CountingPrior, gradient, latents
from shared.sdi_cases import at, red, sdi
from shared.trajectory_cases import (
    ddim,
    ddim_inverse,
)

from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.priors import Prediction, guided_prediction
from scoredist3d.seeding import Rng


class Timed(CountingPrior):
    """Network whose output depends on its timestep input, with a scheduler of the given configuration."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.schedule = NoiseSchedule.from_config(ddim(1, **config).config)

    def predict(self, x_t, t, conditioning) -> Prediction:
        timestep = self.schedule.model_timestep(t).to(x_t)[:, None, None, None]
        prompt = conditioning.text.sum(-1, keepdim=True)[..., None] * conditioning.text[:, :, :1, None]
        output = 0.8 * torch.tanh(x_t + 0.3 * prompt) * torch.cos(timestep / 400 + 0.2) + 0.1 * prompt
        return Prediction(output, self.schedule.prediction_type, x_t, t, self.schedule)


SETTINGS = pytest.mark.parametrize(
    "config",
    [
        {"set_alpha_to_one": one, "prediction_type": kind}
        for one in (False, True)
        for kind in ("epsilon", "v_prediction")
    ],
    ids=str,
)
"""Settings that affect the start of the released code's inversion."""


@SETTINGS
def test_inversion_under_quirk_is_diffusers_inverse_scheduler(config):
    prior, scheduler = Timed(**config), ddim_inverse(10, **config)
    options = {"inversion_guidance_scale": -7.5, "inversion_eta": 0.0, "tau_max": 0.0}
    guidance = sdi(prior, reference_quirk=True, **options, **at(0.901))
    x = z = latents(2)
    for timestep in scheduler.timesteps.tolist():
        t = torch.full((2,), (timestep - 100) / 1000, dtype=torch.float64)  # the first input is -99
        x = scheduler.step(guided_prediction(prior, x, t, red(prior), -7.5).output, timestep, x).prev_sample
    x_t, _ = guidance.inverted(z, red(prior), guidance.begin(z, 0, Rng()))
    torch.testing.assert_close(x_t, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3])
@SETTINGS
def test_quirk_is_the_released_code(config, eta):
    prior, scheduler, inverse = Timed(**config), ddim(50, **config), ddim_inverse(10, **config)
    guidance = sdi(prior, reference_quirk=True, inversion_eta=eta, tau_max=0.1, **at(0.6))
    z, b, rng = latents(2), red(prior), Rng(1)
    conditionings = [b.positive.expand(2), b.unconditional.expand(2)]

    def predict(x, timestep: int, scale: float):
        t = torch.full((2,), timestep / 1000, dtype=torch.float64)
        e_y, e_u = (prior.predict(x, t, conditioning).output for conditioning in conditionings)
        return e_u + scale * (e_y - e_u)

    last = round(guidance.inversion_timesteps(guidance.begin(z, 3, rng))[-1] * 1000)
    assert 600 < last < 700
    grid = [-99, 1, 101, 201, 301, 401, 501, last]
    x = z
    for index, (u, v) in enumerate(pairwise(grid)):
        output = predict(x, u, -7.5)
        abar_u = inverse.alphas_cumprod[u] if u >= 0 else inverse.initial_alpha_cumprod
        abar_v = inverse.alphas_cumprod[v]
        x0, e = (x - (1 - abar_u).sqrt() * output) / abar_u.sqrt(), output
        if config["prediction_type"] == "v_prediction":
            x0 = abar_u.sqrt() * x - (1 - abar_u).sqrt() * output
            e = abar_u.sqrt() * output + (1 - abar_u).sqrt() * x
        x = abar_v.sqrt() * x0 + (1 - abar_v).sqrt() * e
        variance = scheduler._get_variance(v, u)
        x = x + eta * variance.sqrt() * item_noise(rng, f"inversion/{index}", 3, z)
    target = scheduler.step(predict(x, 600, 7.5), 600, x).pred_original_sample
    torch.testing.assert_close(gradient(guidance, z, 3, conditions=b, rng=rng), z - target, rtol=0, atol=1e-9)


def test_quirk_is_the_paper_where_tau_is_zero_and_timesteps_end_at_zero():
    class ZeroBased(Timed):
        def predict(self, x_t, t, conditioning):
            output = super().predict(x_t, t.clamp_min(0.0), conditioning).output
            return Prediction(output, "epsilon", x_t, t, self.schedule)

    z = latents(2)
    options = at(0.6, inversion_eta=0.0)
    same, paper = (
        gradient(sdi(p, reference_quirk=quirk, tau_max=0.0, **options), z, conditions=red(p))
        for p, quirk in ((ZeroBased(set_alpha_to_one=True), True), (ZeroBased(set_alpha_to_one=True), False))
    )
    torch.testing.assert_close(same, paper, rtol=0, atol=1e-10)
    apart = [
        gradient(sdi(p, reference_quirk=quirk, tau_max=0.1, **options), z, conditions=red(p))
        for p, quirk in ((ZeroBased(set_alpha_to_one=True), True), (ZeroBased(set_alpha_to_one=True), False))
    ]
    assert not torch.allclose(*apart, rtol=0, atol=1e-2)
