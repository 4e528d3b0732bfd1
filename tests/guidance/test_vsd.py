"""Variational score distillation: identities with an exact phi, and the training of phi."""

import copy
from dataclasses import replace

import pytest
import torch
from shared.embedded import LATENT_SHAPE
from shared.variational_cases import (
    SMALL,
    ExactPhi,
    M,
    S,
    TellTale,
    blobs,
    conditions,
    gaussian,
    gradient_of,
    latents,
    prior_of,
    same_state,
    state_of,
    tiny_folder,
)
from torch import distributed

from scoredist3d import registry
from scoredist3d.cameras import orbit
from scoredist3d.config.validation import parse_component
from scoredist3d.guidance.core.checks import NonFiniteError
from scoredist3d.guidance.core.context import item_noise
from scoredist3d.guidance.core.score_models import LoraScoreModel, ScoreModelConfig
from scoredist3d.guidance.core.weighting import WEIGHTINGS
from scoredist3d.guidance.sds import ScoreDistillationSampling as SDS
from scoredist3d.guidance.vsd import VariationalScoreDistillation as VSD
from scoredist3d.priors import CFGConditions, predict_each
from scoredist3d.seeding import Rng


def vsd(prior, exact=None, *, phi: ScoreModelConfig = SMALL, **options) -> VSD:
    """VSD with ``exact`` in place of the score model."""
    guidance = VSD(VSD.Config(phi=phi, **options), prior=prior)
    if exact is not None:
        guidance.phi = exact
    return guidance


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prior_of(tiny_folder(tmp_path_factory.mktemp("vsd") / "tiny")).requires_grad_(False)


def around(prior, batch: int = 3) -> CFGConditions:
    """CFG conditions with cameras on all sides."""
    angle, one = torch.arange(batch) * 100.0, torch.ones(batch)
    return replace(conditions(prior), cameras=orbit(angle, 20 * one, 3 * one, 40 * one, 8, 8))


def test_is_registered_and_configured_with_the_papers_numbers():
    entry = registry.lookup("guidance", "vsd")
    assert entry.cls is VSD and entry.arxiv == "2305.16213"
    config = parse_component(
        "guidance", {"type": "vsd", "phi": {"network": "unet", "lr": {"from": 0, "to": 1e-4, "end": 500}}}
    )
    assert config.guidance_scale(0) == 7.5 and config.gamma_phi(0) == 1.0 and config.weighting == "sds"
    assert config.phi.lr(250) == pytest.approx(5e-5) and config.phi.camera_dropout == 0.1 and config.phi.rank == 4
    with pytest.raises(ValueError, match="rnak"):
        parse_component("guidance", {"type": "vsd", "phi": {"rnak": 4}})


# The gradient, with exact phis


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_phi_of_a_single_point_is_sds(weighting):
    prior, z, rng = blobs(), latents(), Rng(3)
    dirac = TellTale(item_noise(rng, "noise", 4, z), prior.schedule)
    gradient = gradient_of(vsd(prior, dirac, weighting=weighting), z, 4, rng)
    sds = gradient_of(SDS(SDS.Config(guidance_scale=7.5, weighting=weighting), prior=prior), z, 4, rng)
    torch.testing.assert_close(gradient, sds, rtol=0, atol=1e-11 * sds.abs().max())
    # The exact score of a point mass, up to rounding.
    exact = ExactPhi(prior.schedule, z, torch.zeros((), dtype=torch.float64))
    again = gradient_of(vsd(prior, exact, weighting=weighting), z, 4, rng)
    torch.testing.assert_close(again, sds, rtol=0, atol=1e-10 * sds.abs().max())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_phi_equal_to_the_prior_leaves_the_classifiers_direction(kind):
    prior, z, rng = blobs(kind), latents(), Rng(3)
    assert gradient_of(vsd(prior, prior, guidance_scale=1.0), z, 4, rng).abs().max() < 1e-9
    guidance = vsd(prior, prior, guidance_scale=7.5)
    step = guidance.begin(z, 4, rng)
    x_t, _ = guidance.noised(z, step)
    b = conditions(prior)
    conditional, free = (p.eps for p in predict_each(prior, x_t, step.t, [b.positive, b.unconditional]))
    expected = prior.schedule.sigma(step.t)[:, None, None, None] ** 2 * 6.5 * (conditional - free)
    # The terms of eps reach sigma / alpha times the output's rounding at high timesteps.
    torch.testing.assert_close(gradient_of(guidance, z, 4, rng), expected, rtol=0, atol=1e-9)


def test_fresh_adapters_give_nothing_without_text_guidance(tiny):
    guidance = vsd(tiny, phi=ScoreModelConfig(), guidance_scale=1.0)
    assert isinstance(guidance.phi, LoraScoreModel)
    z = latents((2, *LATENT_SHAPE)).float()
    fresh = gradient_of(guidance, z, b=around(tiny, 2)).abs().max()
    trained = gradient_of(guidance, z, 1, b=around(tiny, 2)).abs().max()  # by the step before
    assert fresh < 1e-6 and trained > 1e-4


def test_one_denoiser_as_eps_and_as_velocity_gives_one_gradient():
    prior, z = blobs(), latents()
    gradients = [gradient_of(vsd(prior, blobs(kind)), z, b=conditions(prior)) for kind in ("epsilon", "v_prediction")]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[0].abs().max() > 0.1


def test_gamma_phi_says_how_much_the_camera_counts():
    prior, z = blobs(), latents()
    b, seen = around(prior), latents(seed=8)
    gradients = {}
    for gamma in (0.0, 0.5, 1.0):
        phi = ExactPhi(prior.schedule, 0.0, 1.0, dirac=seen)
        gradients[gamma] = gradient_of(vsd(prior, phi, gamma_phi=gamma), z, b=b)
        asked = [camera.abs().sum(1).gt(0).tolist() for camera in phi.cameras]
        assert asked == {0.0: [[False] * 3], 0.5: [[True] * 3 + [False] * 3], 1.0: [[True] * 3]}[gamma]
    torch.testing.assert_close(gradients[0.5], 0.5 * (gradients[0.0] + gradients[1.0]), rtol=0, atol=1e-12)
    blind = gradient_of(vsd(prior, ExactPhi(prior.schedule, 0.0, 1.0), gamma_phi=1.0), z, b=b)
    torch.testing.assert_close(gradients[0.0], blind, rtol=0, atol=1e-12)
    assert not torch.allclose(gradients[1.0], blind)


@pytest.mark.parametrize("timestep", [0.1, 0.5, 0.9])
def test_expected_gradient_between_gaussians(timestep):
    prior, mean, std = gaussian(), -0.3, 1.2
    guidance = vsd(prior, ExactPhi(prior.schedule, mean, std), guidance_scale=1.0)
    t = torch.tensor([timestep], dtype=torch.float64)
    alpha, sigma = (c.item() for c in prior.schedule.coefficients(t))
    spread_p, spread_q = alpha**2 * S**2 + sigma**2, alpha**2 * std**2 + sigma**2
    z = latents((1, 1, 2, 2))
    exact = sigma**2 * sigma * alpha * ((z - M) / spread_p - (z - mean) / spread_q)
    # G is affine in eps, so the pair eps, -eps gives its mean without sampling error.
    step = replace(guidance.begin(z, 0, Rng()), t=t, timesteps=(timestep,))
    pair = []
    for sign in (1.0, -1.0):
        guidance.noised = lambda z, step, sign=sign: (
            prior.schedule.add_noise(z, sign * step.noise(z), step.t),
            sign * step.noise(z),
        )
        pair.append(guidance.score_gradient(z, conditions(prior, ""), step).gradient)
    torch.testing.assert_close(0.5 * (pair[0] + pair[1]), exact, rtol=0, atol=1e-12)
    assert (pair[0] - pair[1]).abs().max() > 1e-3
    equal = vsd(prior, ExactPhi(prior.schedule, M, S), guidance_scale=1.0)
    torch.testing.assert_close(gradient_of(equal, z, b=conditions(prior, "")), 0 * z, rtol=0, atol=1e-12)


def test_particles_keep_the_priors_spread_where_sds_collapses():
    prior = gaussian()
    options = {"guidance_scale": 1.0, "weighting": "lambda"}
    ends = {}
    for name in ("vsd", "sds"):
        phi = ExactPhi(prior.schedule, 0.0, 1.0)
        guidance = vsd(prior, phi, **options) if name == "vsd" else SDS(SDS.Config(**options), prior=prior)
        z = 2.0 * latents((32, 1, 2, 2))
        for step in range(150):
            phi.mean, phi.std = z.mean(), z.std(correction=0)
            z = z - 0.5 * 20.0 ** (-step / 150) * gradient_of(guidance, z, step, Rng(1), conditions(prior, ""))
        ends[name] = z
    # Two moments obey a closed system; its fixed point is the prior's mean and deviation.
    assert abs(ends["vsd"].mean() - M) < 0.02 and abs(ends["vsd"].std(correction=0) - S) < 0.02
    assert abs(ends["sds"].mean() - M) < 0.02 and ends["sds"].std() < 0.1 * S


# The training of phi


def test_overfitted_phi_finds_the_injected_noise():
    prior = blobs()
    guidance = vsd(prior, phi=replace(SMALL, channels=[8], lr=2e-2, repeats=4, camera_dropout=0.0))
    z = torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64)[None, :, None, None].expand(1, 3, 8, 8)
    b = conditions(prior)

    def error() -> float:
        """Mean square of eps_phi - eps at fresh noise, where 1 is the power of eps."""
        step = guidance.begin(z.expand(16, -1, -1, -1), 0, Rng(9))
        x_t, eps = guidance.noised(z.expand(16, -1, -1, -1), step)
        with torch.no_grad():
            return (guidance.phi_prediction(x_t, step, b).eps - eps).square().mean().item()

    before = error()
    for step in range(60):
        guidance.update(z, b, guidance.begin(z, step, Rng()))
    assert before > 0.1 and error() < before / 3


def test_particles_and_phi_do_not_train_each_other(tiny):
    guidance = vsd(tiny, phi=ScoreModelConfig(lr=1e-2))
    before, frozen = state_of(guidance), state_of(tiny)
    z = latents((2, *LATENT_SHAPE)).float().requires_grad_()
    loss = guidance(z, around(tiny, 2), 0, Rng()).loss
    assert z.grad is None and not same_state(state_of(guidance), before)  # phi has trained, z has not moved
    trained = state_of(guidance)
    for p in guidance.parameters():
        p.grad = None
    loss.backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in guidance.parameters())
    assert same_state(state_of(guidance), trained) and same_state(state_of(tiny), frozen)


def test_phi_trains_on_all_timesteps_with_fresh_noise_and_some_cameras_dropped():
    prior, z = blobs(), latents()
    config = replace(SMALL, channels=[4], steps=2, repeats=25, camera_dropout=0.3)
    guidance = vsd(prior, phi=config, t_min=0.4, t_max=0.4)
    calls, predict = [], guidance.phi.predict
    guidance.phi.predict = lambda x_t, t, c: calls.append((x_t, t, c)) or predict(x_t, t, c)
    b = around(prior)
    for step in range(4):
        guidance(z, b, step, Rng())
    ours, training = calls[::3], [call for index, call in enumerate(calls) if index % 3]
    assert [len(x) for x, _, _ in ours] == [3] * 4 and [len(x) for x, _, _ in training] == [75] * 8
    assert all(c.camera.abs().sum(1).gt(0).all() for _, _, c in ours)
    t = torch.cat([t for _, t, _ in training])
    steps = (t * 1000).round()
    # 600 uniform draws of 0..999: standard errors 11.8 of the mean, 0.019 of the dropped share.
    assert abs(steps.mean() - 499.5) < 4 * 11.8 and steps.min() < 20 and steps.max() > 980
    dropped = torch.cat([c.camera for _, _, c in training]).abs().sum(1).eq(0).double().mean()
    assert abs(dropped - 0.3) < 4 * 0.019
    noises = torch.cat([(x - a * z.repeat(25, 1, 1, 1)) / s for x, a, s in map(_mixed(prior), training)])
    assert len({round(value, 9) for value in noises[:, 0, 0, 0].tolist()}) == 600  # every evaluation has its own noise
    assert abs(noises.std() - 1) < 4 / (2 * noises.numel()) ** 0.5


def _mixed(prior):
    def of(call):
        x_t, t, _ = call
        alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(t))
        return x_t, alpha, sigma

    return of


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_levels_of_phi_are_equally_likely(kind):
    guidance = vsd(blobs(kind))
    steps = [
        round(timestep * 1000)
        for step in range(60)
        for timestep in guidance._phi_timesteps(100, guidance.begin(latents((1, 3, 8, 8)), step, Rng()), "phi/0/0")
    ]
    # 6000 draws in 10 bins: the standard deviation of a count is 23.
    counts = torch.histc(torch.tensor(steps).double(), bins=10, min=0, max=1000)
    lowest, highest = (1, 1000) if kind == "flow" else (0, 999)
    assert (counts - 600).abs().max() < 4 * 23.3
    assert lowest <= min(steps) <= lowest + 4 and highest - 4 <= max(steps) <= highest


def test_learning_rate_follows_its_schedule_and_the_loss_decreases(tiny):
    guidance = vsd(tiny, phi=ScoreModelConfig(lr={"from": 0.0, "to": 1e-2, "end": 1, "shape": "step"}))
    z, b = 0.5 * latents((2, *LATENT_SHAPE)).float(), around(tiny, 2)
    before = state_of(guidance.phi)
    first = guidance.update(z, b, guidance.begin(z, 0, Rng()))["phi_loss"]
    assert same_state(state_of(guidance.phi), before)  # rate 0
    for _ in range(24):
        guidance.update(z, b, guidance.begin(z, 5, Rng()))
    last = guidance.update(z, b, guidance.begin(z, 0, Rng()))["phi_loss"]
    assert last < 0.98 * first


def test_replay_trains_on_earlier_latents():
    prior = blobs()
    guidance = vsd(prior, phi=replace(SMALL, replay=5, steps=6, camera_dropout=0.0))
    told = []
    predict = guidance.phi.predict
    guidance.phi.predict = lambda x_t, t, c: told.append(c.camera) or predict(x_t, t, c)
    b, one = conditions(prior), torch.ones(2)
    for step in range(4):
        cameras = orbit(torch.tensor([20.0, 100.0]) * (step + 1), 0 * one, 3 * one, 40 * one, 8, 8)
        guidance(latents((2, 3, 8, 8), seed=step), replace(b, cameras=cameras), step, Rng())
    # The last five of eight latents are kept, and the last step draws twelve times from those, not from its own two.
    kept = guidance.get_extra_state()["replay"]
    assert torch.equal(kept["latents"][-2:], latents((2, 3, 8, 8), seed=3)) and len(kept["latents"]) == 5
    drawn, known = (set(map(tuple, cameras.tolist())) for cameras in (torch.cat(told[-6:]), kept["cameras"]))
    assert drawn <= known and len(known) == 5 and len(drawn) > 2


def test_replay_is_refused_on_several_devices(monkeypatch):
    prior = blobs()
    guidance = vsd(prior, phi=replace(SMALL, replay=5))
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^phi\.replay: not supported with several devices"):
        guidance(latents((2, 3, 8, 8)), conditions(prior), 0, Rng())


def test_non_finite_training_stops_with_its_name():
    guidance = vsd(blobs())
    guidance.phi.network.conv_out.weight.data.fill_(float("inf"))
    z = latents()
    with pytest.raises(NonFiniteError, match="step 7: NaN or infinity in the gradient of phi"):
        guidance.update(z, conditions(guidance.prior), guidance.begin(z, 7, Rng()))


# State


def run(guidance: VSD, steps: range, z: torch.Tensor) -> torch.Tensor:
    """Plain gradient descent on z."""
    for step in steps:
        z = z - 0.1 * gradient_of(guidance, z, step, Rng(2), around(guidance.prior, len(z)))
    return z


@pytest.mark.parametrize("network", ["lora", "unet"])
def test_a_resumed_run_equals_the_uninterrupted_one(network, tiny, tmp_path):
    config = ScoreModelConfig(network=network, channels=[8, 8], lr=1e-2, replay=4)
    first, start = vsd(tiny, phi=config), latents((2, *LATENT_SHAPE)).float()
    halfway = run(first, range(2), start)
    torch.save(first.state_dict(), tmp_path / "state")
    end = run(first, range(2, 4), halfway)
    resumed = vsd(tiny, phi=config)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    resumed.to("cpu")  # loading comes before moving, both before the first step
    assert torch.equal(run(resumed, range(2, 4), halfway), end)
    assert same_state(state_of(resumed), state_of(first))
    forgotten = vsd(tiny, phi=config)
    forgotten.load_state_dict({**torch.load(tmp_path / "state"), "_extra_state": forgotten.get_extra_state()})
    run(forgotten, range(2, 4), halfway)
    assert not same_state(state_of(forgotten), state_of(first))  # the optimizer's state matters


def test_moving_keeps_the_optimisers_state(tiny):
    config, start = ScoreModelConfig(lr=1e-2), latents((2, *LATENT_SHAPE)).float()
    still, moved = (vsd(tiny, phi=config) for _ in range(2))
    z, same = run(still, range(2), start), run(moved, range(2), start)
    moved.to("cpu")
    assert torch.equal(run(still, range(2, 4), z), run(moved, range(2, 4), same))
    assert same_state(state_of(still), state_of(moved))


def test_several_instances_share_one_prior_without_meeting(tiny):
    config, start = ScoreModelConfig(lr=1e-2), latents((2, *LATENT_SHAPE)).float()
    alone = run(vsd(tiny, phi=config), range(3), start)
    one, other = vsd(tiny, phi=config), vsd(tiny, phi=replace(config, rank=2))
    z, w = start, start
    for step in range(3):
        z, w = run(one, range(step, step + 1), z), run(other, range(step, step + 1), w)
    assert torch.equal(z, alone) and not torch.equal(w, z)


def test_ranks_train_phi_on_the_mean_of_their_gradients(monkeypatch):
    prior = blobs()
    z, b = latents((2, 3, 8, 8)), conditions(prior)

    def gradients(rank: int, exchange=None) -> torch.Tensor:
        if exchange is not None:
            monkeypatch.setattr(distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
            monkeypatch.setattr(distributed, "all_reduce", exchange)
        guidance = vsd(prior)
        guidance.update(z, b, guidance.begin(z, 0, Rng(0, rank)))
        return torch.cat([p.grad.flatten() for p in guidance.phi.parameters()])

    own, others = gradients(0), gradients(1)
    assert not torch.equal(own, others)
    # The gradients are exchanged as sums over the elements.
    both = gradients(0, exchange=lambda flat: flat.add_(others * z.numel()))
    torch.testing.assert_close(both, 0.5 * (own + others), rtol=1e-5, atol=1e-9)


def test_ranks_start_from_the_same_phi():
    one, other = (VSD(VSD.Config(phi=SMALL), prior=blobs(), rng=Rng(4, rank)) for rank in (0, 1))
    assert same_state(state_of(one), state_of(other))


@pytest.mark.parametrize("options", [{}, {"gamma_phi": 0.5}, {"gamma_phi": 0.0, "guidance_scale": 1.0}])
def test_cost_counts_every_row(options):
    prior = blobs()
    guidance = vsd(prior, phi=replace(SMALL, steps=2, repeats=3), **options)
    rows = {"prior": 0, "own": 0}
    for owner, network in (("prior", prior), ("own", guidance.phi)):

        def counted(x_t, t, c, owner=owner, predict=network.predict):
            rows[owner] += len(x_t)
            return predict(x_t, t, c)

        network.predict = counted
    b, z = conditions(prior), latents()
    guidance(z, b, 0, Rng())
    nfe = guidance.nfe(b, guidance.begin(z, 0, Rng()))
    assert (nfe.prior * 3, nfe.own * 3) == (rows["prior"], rows["own"])
    assert guidance.nfe(b, guidance.begin(z, 0, Rng())).own == (2 if options.get("gamma_phi") == 0.5 else 1) + 6


def test_items_do_not_depend_on_the_batch():
    prior, z = blobs(), latents((4, 3, 8, 8))
    four, two = (gradient_of(vsd(prior), part, 3) for part in (z, z[:2]))
    torch.testing.assert_close(four[:2], two, rtol=0, atol=1e-12)
    fresh = vsd(prior)
    trained = copy.deepcopy(state_of(fresh.phi))
    gradient_of(fresh, z, 3)
    assert not same_state(state_of(fresh.phi), trained)
