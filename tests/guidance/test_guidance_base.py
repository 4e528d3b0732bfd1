"""Base class of guidance: timesteps, noise, surrogate loss, finite checks, previews and state."""

import math

import pytest
import torch

from scoredist3d.guidance import Guidance, Score, StepContext
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.guidance.core.outputs import surrogate_loss
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.seeding import Rng


class Constant(Guidance):
    """Method with a given gradient, one trainable parameter and its optimizer."""

    def __init__(self, config, *, prior, gradient=1.0) -> None:
        super().__init__(config, prior=prior)
        self.gradient, self.seen = gradient, []
        self.phi = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.phi], lr=0.5)

    def score_gradient(self, z, conditions, ctx: StepContext) -> Score:
        assert not z.requires_grad and not torch.is_grad_enabled()
        self.seen.append(ctx)
        rgb_gradient = None if ctx.rgb is None else torch.full_like(ctx.rgb, 2.0)
        return Score(self.gradient * torch.ones_like(z), rgb_gradient, {"own": z.mean()})

    def update(self, z, conditions, step):
        loss = (self.phi - z.mean()).square()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"phi_loss": loss}


def prior(**options) -> GaussianMixturePrior:
    return GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8, **options))


def conditions(p) -> CFGConditions:
    return CFGConditions(p.embed(["red"]), p.embed([""]))


def latents(batch: int = 3, requires_grad: bool = True) -> torch.Tensor:
    z = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return z.requires_grad_(requires_grad)


def method(gradient=1.0, **options) -> Constant:
    return Constant(Constant.Config(**options), prior=prior(), gradient=gradient)


def test_surrogate_gradient_is_exactly_g_over_b_and_its_value_half_the_square():
    # Far smaller than z, where z - (z - G) would round; the batch is a power of two, so that / B is exact.
    z, gradient = latents(4), latents(4, False) * 1e-9
    loss = surrogate_loss(z, gradient)
    loss.backward()
    assert torch.equal(z.grad, gradient / 4)
    assert loss.item() == pytest.approx(0.5 * gradient.square().sum().item() / 4, rel=1e-12)
    reference = latents(4)
    (0.5 * (reference - (reference - gradient).detach()).square().sum() / 4).backward()
    torch.testing.assert_close(z.grad, reference.grad, rtol=0, atol=1e-15)


def test_loss_weight_and_clipping():
    z = latents(2)
    g = method(gradient=3.0, weight=0.5, grad_clip=[0, 1.0, 2.0, 10])
    for step, limit in ((0, 1.0), (5, 1.5), (99, 2.0)):
        (gradient,) = torch.autograd.grad(g(z, conditions(g.prior), step, Rng()).loss, z)
        assert torch.equal(gradient, torch.full_like(z, 0.5 * limit / 2))


def test_image_gradient_reaches_the_render_only_through_rgb():
    generator = torch.Generator().manual_seed(0)
    z, rgb = latents(2), torch.rand(2, 8, 8, 3, generator=generator, dtype=torch.float64).requires_grad_()
    g = method(gradient=0.0)
    loss = g(z, conditions(g.prior), 0, Rng(), rgb=rgb).loss
    assert torch.equal(torch.autograd.grad(loss, rgb)[0], torch.full_like(rgb, 2.0 / 2))


def test_gradients_of_further_maps_reach_the_render(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    maps = {
        name: torch.rand(2, 8, 8, channels, generator=generator, dtype=torch.float64).requires_grad_()
        for name, channels in (("opacity", 1), ("normal", 3), ("depth", 1))
    }
    values = {"opacity": 3.0, "normal": -4.0, "depth": 5.0}

    def score_gradient(self, z, conditions, ctx: StepContext) -> Score:
        gradients = {f"{name}_gradient": torch.full_like(maps[name], value) for name, value in values.items()}
        return Score(torch.zeros_like(z), **gradients)

    monkeypatch.setattr(Constant, "score_gradient", score_gradient)
    g = method(weight=0.5)
    found = torch.autograd.grad(g(latents(2), conditions(g.prior), 0, Rng(), **maps).loss, list(maps.values()))
    for name, gradient in zip(maps, found, strict=True):
        assert torch.equal(gradient, torch.full_like(maps[name], 0.5 * values[name] / 2))
    g(latents(2), conditions(g.prior), 0, Rng())  # a gradient without its map is not used
    values["depth"] = math.nan
    with pytest.raises(NonFiniteError, match="the depth gradient of Constant"):
        g(latents(2), conditions(g.prior), 1, Rng(), **maps)
        g.check_finite()


def test_timesteps_are_quantized_and_cover_their_range():
    g = method(t_min=0.2, t_max=0.6)
    timesteps = [timestep for step in range(300) for timestep in g.sample_timesteps(2, step, Rng(1))]
    assert 0.2 <= min(timesteps) < 0.21 and 0.59 < max(timesteps) <= 0.6
    assert all(abs(timestep * 1000 - round(timestep * 1000)) < 1e-9 for timestep in timesteps)
    # Mean of 600 uniform draws: standard error 0.4 / sqrt(12 * 600) = 0.0047.
    assert abs(sum(timesteps) / 600 - 0.4) < 4 * 0.0047


def test_annealed_timesteps_are_deterministic_and_follow_the_schedule():
    hifa = {"from": 0.98, "to": 0.3, "end": 100, "shape": "sqrt"}
    g = method(t_min=hifa, t_max=hifa)
    for step in (0, 25, 60, 200):
        expected = 0.98 - 0.68 * math.sqrt(min(step, 100) / 100)
        assert g.sample_timesteps(3, step, Rng(step)) == [pytest.approx(expected, abs=5.1e-4)] * 3


def test_jointly_denoised_views_share_a_timestep():
    g = method()
    g.prior.views = 2
    a, b, c, d = g.sample_timesteps(4, 0, Rng())
    assert a == b != c == d


def test_items_do_not_depend_on_the_batch_nor_on_earlier_calls():
    rng = Rng(7)
    big, small = item_noise(rng, "noise", 3, latents(4, False)), item_noise(rng, "noise", 3, latents(2, False))
    assert torch.equal(big[:2], small) and not torch.equal(big[0], big[1])
    g = method()
    assert g.sample_timesteps(4, 3, rng)[:2] == g.sample_timesteps(2, 3, rng)
    before = torch.random.get_rng_state()
    g(latents(2), conditions(g.prior), 3, rng)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(item_noise(rng, "noise", 4, latents(2, False)), small)
    # Moments of 4 * 192 normals: standard error of the mean 0.036, of the variance 0.051.
    assert abs(big.mean()) < 4 * 0.036 and abs(big.var() - 1) < 4 * 0.051


def test_the_context_of_a_step():
    g = method()
    particles = [4, 1]
    g(latents(2), conditions(g.prior), 9, Rng(), opacity=torch.ones(2, 8, 8, 1), particles=particles)
    (step,) = g.seen
    assert step.step == 9 and step.particles == (4, 1) and step.opacity is not None and step.rgb is None
    assert step.t.tolist() == list(step.timesteps) and step.t.dtype == torch.float64


def test_own_state_is_trained_saved_and_free_of_the_prior():
    g = method()
    z = latents(2)
    output = g(z, conditions(g.prior), 0, Rng())
    assert g.phi.item() == pytest.approx(z.mean().item(), abs=1e-12)  # SGD with rate 0.5 on a parabola ends in one step
    assert set(g.state_dict()) == {"phi"}
    assert set(output.diagnostics) == {"t", "gradient_rms", "latent_rms", "own", "phi_loss"}
    assert all(v.numel() == 1 and not v.requires_grad for v in output.diagnostics.values())
    assert output.diagnostics["gradient_rms"].item() == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_stop_with_step_and_term(bad):
    g = method(gradient=bad)
    with pytest.raises(NonFiniteError, match="step 12: NaN or infinity in the gradient of Constant"):
        g(latents(2), conditions(g.prior), 12, Rng())
    z = latents(2).detach()
    z[1, 0, 0, 0] = bad
    g = method()
    with pytest.raises(NonFiniteError, match="step 3: NaN or infinity in the latents of the render"):
        g(z.requires_grad_(), conditions(g.prior), 3, Rng())


@pytest.mark.gpu
def test_non_finite_values_are_reported_at_the_next_step_on_cuda():
    g = method(gradient=math.nan)
    g.prior.to("cuda")
    z = latents(2, False).to("cuda").requires_grad_()
    g(z, conditions(g.prior), 12, Rng())
    with pytest.raises(NonFiniteError, match="step 12: NaN or infinity in the gradient"):
        g(z, conditions(g.prior), 13, Rng())


def test_empty_timestep_ranges_are_rejected():
    assert Guidance.Config().validate() == []
    assert Guidance.Config(t_min=0.5, t_max=[0, 0.98, 0.3, 10]).validate() == [
        "t_min: 0.5 is above t_max 0.3 at step 10; lower t_min or raise t_max"
    ]
    with pytest.raises(ValueError, match=r"t_min: 0\.6 is above t_max 0\.4 at step 0"):
        method(t_min=0.6, t_max=0.4).sample_timesteps(1, 0, Rng())


def test_previews_show_what_the_step_saw():
    g = method(guidance_scale=1.0, t_min=0.5, t_max=0.9)
    z, b, rng = latents(2, False), conditions(g.prior), Rng(3)
    images = g.preview(z, b, 4, rng, denoise_steps=20)
    assert {name: tuple(image.shape) for name, image in images.items()} == dict.fromkeys(
        ("noisy", "one_step", "denoised"), (2, 8, 8, 3)
    )
    t = torch.tensor(g.sample_timesteps(2, 4, rng), dtype=torch.float64)
    x_t = g.schedule.add_noise(z, item_noise(rng, "noise", 4, z), t)
    torch.testing.assert_close(images["noisy"], g.prior.decode(x_t).clamp(0, 1), rtol=0, atol=1e-12)
    one_step = g.prior.predict(x_t, t, b.positive.expand(2)).x0
    torch.testing.assert_close(images["one_step"], g.prior.decode(one_step).clamp(0, 1))
    assert torch.equal(images["denoised"], g.preview(z, b, 4, rng, denoise_steps=20)["denoised"])
    # Full denoising converges to one of the two red modes, whose spread is 0.05 in RGB; the inputs are far from both.
    modes = g.prior.decode(g.prior._means[:2])
    distance = [(image[:, None] - modes).square().mean((2, 3, 4)).sqrt().amin(1).max() for image in images.values()]
    assert distance[2] < 0.08 < 0.2 < distance[0]
