"""Score models of the variational methods: adapters on an unchanged network, and a small UNet."""

from dataclasses import replace

import pytest
import torch
from shared.embedded import LATENT_SHAPE
from shared.variational_cases import blobs, latents, prior_of, same_state, state_of, tiny_folder

from scoredist3d.cameras import orbit
from scoredist3d.diffusion.schedule import FlowSchedule, VPSchedule
from scoredist3d.diffusion.standard_velocity import StandardVelocity
from scoredist3d.guidance.core.score_models import (
    LoraScoreModel,
    ScoreModelConfig,
    UNetScoreModel,
    build_score_model,
    matching_output,
    phi_conditioning,
)
from scoredist3d.priors import CFGConditions, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.priors.camera_embedding import camera_embedding
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.seeding import Rng


@pytest.fixture(scope="module")
def embedded():
    return prior_of("embedded").requires_grad_(False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prior_of(tiny_folder(tmp_path_factory.mktemp("phi") / "tiny")).requires_grad_(False)


def query(prior, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """x_t, t and a conditioning with cameras."""
    conditioning = replace(prior.embed(["a red mug"] * batch), camera=latents((batch, 16), seed=9).float())
    return latents((batch, *LATENT_SHAPE)).float(), torch.tensor([0.3, 0.8])[:batch], conditioning


def base_output(prior, x_t, t, conditioning) -> torch.Tensor:
    return prior.predict(x_t, t, conditioning if prior.takes_cameras else replace(conditioning, camera=None)).output


def train_a_little(phi, x_t, t, conditioning, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(phi.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        phi.predict(x_t, t, conditioning).output.square().mean().backward()
        optimizer.step()


@pytest.fixture(params=["embedded", "tiny"])
def prior(request):
    """A prior with camera conditioning and one without."""
    return request.getfixturevalue(request.param)


def test_adapters_start_as_the_base_and_never_change_it(prior):
    before, names = state_of(prior), [name for name, _ in prior.named_modules()]
    question = query(prior)
    reference = base_output(prior, *question)
    phi = build_score_model(ScoreModelConfig(), prior, Rng())
    assert isinstance(phi, LoraScoreModel) and (phi.camera is None) == prior.takes_cameras
    torch.testing.assert_close(phi.predict(*question).output, reference, rtol=0, atol=1e-5)
    assert torch.equal(base_output(prior, *question), reference)
    train_a_little(phi, *question)
    assert (phi.predict(*question).output - reference).abs().max() > 1e-3
    assert torch.equal(base_output(prior, *question), reference)
    assert same_state(state_of(prior), before) and [name for name, _ in prior.named_modules()] == names
    assert all(p.grad is None and not p.requires_grad for p in prior.parameters())


def test_several_phis_on_one_network_are_independent(tiny):
    question = query(tiny)
    first, second = (build_score_model(ScoreModelConfig(rank=rank), tiny, Rng()) for rank in (2, 3))
    train_a_little(first, *question)
    kept = first.predict(*question).output.detach()
    torch.testing.assert_close(second.predict(*question).output, base_output(tiny, *question), rtol=0, atol=1e-5)
    train_a_little(second, *question, steps=3)
    assert torch.equal(first.predict(*question).output, kept)
    assert not torch.equal(second.predict(*question).output, kept)


def test_a_failing_call_leaves_the_network_its_own_layers(tiny):
    phi = build_score_model(ScoreModelConfig(), tiny, Rng())
    x_t, t, conditioning = query(tiny)
    with pytest.raises(PriorError, match=r"the unet of .* cannot be used"):
        phi.predict(x_t[:, :3], t, conditioning)
    assert not any("lora" in name for name, _ in tiny.named_modules())
    assert not tiny.denoiser.network.time_embedding._forward_hooks


def test_only_the_adapters_are_parameters_and_they_stay_in_single_precision(tmp_path):
    prior = prior_of(tiny_folder(tmp_path / "tiny")).requires_grad_(False)
    phi = build_score_model(ScoreModelConfig(rank=3), prior, Rng())
    shapes = [tuple(p.shape) for p in phi.down.parameters()]
    linears = [prior.denoiser.network.get_submodule(path) for path in prior.adapter_points().linears]
    # One attention block below, two above, one in the middle: each attends to itself and to the text.
    assert len(linears) == 4 * 2 * 4 and shapes == [(3, layer.in_features) for layer in linears]
    assert {name.split(".")[0] for name in phi.state_dict()} == {"down", "up", "camera"}
    prior.denoiser.network.to(torch.bfloat16)
    assert {p.dtype for p in phi.parameters()} == {torch.float32}
    x_t, t, conditioning = query(prior)
    assert phi.predict(x_t, t, conditioning).output.dtype == x_t.dtype
    train_a_little(phi, x_t, t, conditioning)
    assert {p.grad.dtype for p in phi.parameters()} == {torch.float32}
    assert {p.dtype for p in prior.denoiser.network.parameters()} == {torch.bfloat16}


def test_initialisation_depends_on_the_seed_alone(tiny):
    before = torch.random.get_rng_state()
    for config in (ScoreModelConfig(), ScoreModelConfig(network="unet", channels=[8, 8])):
        one, again, other = (build_score_model(config, tiny, rng) for rng in (Rng(1), Rng(1), Rng(2)))
        assert same_state(state_of(one), state_of(again)) and not same_state(state_of(one), state_of(other))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_camera_reaches_a_network_without_cameras_through_its_time_embedding(tiny):
    phi = build_score_model(ScoreModelConfig(), tiny, Rng())
    x_t, t, conditioning = query(tiny)
    with torch.no_grad():
        phi.camera[-1].bias.fill_(0.5)
    handle = tiny.denoiser.network.time_embedding.register_forward_hook(lambda _, __, output: output + 0.5)
    expected = base_output(tiny, x_t, t, conditioning)
    handle.remove()
    torch.testing.assert_close(phi.predict(x_t, t, conditioning.without_camera()).output, expected, rtol=0, atol=1e-6)
    # The last weights are still zero.
    pair = (phi.predict(x_t, t, c).output for c in (conditioning, conditioning.without_camera()))
    torch.testing.assert_close(*pair, rtol=0, atol=1e-5)
    with torch.no_grad():
        phi.camera[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(
        phi.predict(x_t, t, conditioning).output, phi.predict(x_t, t, conditioning.without_camera()).output
    )


@pytest.mark.parametrize(("side", "resolutions"), [(2, 1), (5, 1), (8, 2), (12, 2), (16, 3), (64, 4)])
def test_small_latents_have_fewer_resolutions(side, resolutions):
    mixture = blobs() if side == 8 else GaussianMixturePrior(GaussianMixturePrior.Config(image_size=max(side, 4)))
    mixture.image_size = side
    phi = build_score_model(ScoreModelConfig(channels=[4, 8, 8, 8]), mixture, Rng())
    assert isinstance(phi, UNetScoreModel) and len(phi.network.down_blocks) == resolutions
    x_t, t = latents((2, 3, side, side)), torch.tensor([0.2, 0.7], dtype=torch.float64)
    conditioning = Conditioning(torch.zeros(2, 1, 1), camera=torch.ones(2, 16))
    # Initially it is the exact denoiser of standard normal latents.
    sigma = mixture.schedule.sigma(t)[:, None, None, None]
    torch.testing.assert_close(phi.predict(x_t, t, conditioning).eps, sigma * x_t, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        phi.network.conv_out.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert phi.predict(x_t[..., :-1], t, conditioning).output.shape == (2, 3, side, side - 1)


def test_standard_velocity_means_the_same_for_every_parametrisation():
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    for schedule in (VPSchedule.stable_diffusion(), FlowSchedule(shift=3.0), VPSchedule.stable_diffusion("sample")):
        own = StandardVelocity(schedule)
        (a, b), (alpha, sigma) = own.velocity_coefficients(t), own.coefficients(t)
        torch.testing.assert_close(a * alpha + b * sigma, torch.ones_like(t), rtol=0, atol=1e-14)
        assert torch.equal(own.quantize(t), schedule.quantize(t)) and torch.equal(
            own.model_timestep(t), schedule.model_timestep(t)
        )
    vp = VPSchedule.stable_diffusion()
    torch.testing.assert_close(
        StandardVelocity(vp).velocity_coefficients(t), vp.velocity_coefficients(t), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", [VPSchedule.stable_diffusion(), FlowSchedule(), StandardVelocity(FlowSchedule())])
def test_training_targets_are_in_the_networks_own_parametrisation(kind, schedule):
    x0, eps, t = latents(), latents(seed=6), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    target = matching_output(Prediction(x0, kind, x_t, t, schedule), x0, eps)
    meant = Prediction(target, kind, x_t, t, schedule)
    torch.testing.assert_close(meant.eps, eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(meant.x0, x0, rtol=0, atol=1e-12)


def test_phi_is_conditioned_on_the_plain_prompt_and_the_camera(embedded):
    front, plain, empty = (embedded.embed([text]) for text in ("a mug, front view", "a mug", ""))
    b = CFGConditions(front, empty, plain=plain)
    assert torch.equal(phi_conditioning(b, 3).text, plain.text.expand(3, -1, -1))
    assert torch.equal(phi_conditioning(replace(b, plain=None), 3).text, front.text.expand(3, -1, -1))
    blind = replace(plain, camera=None)
    angle, one = torch.zeros(2), torch.ones(2)
    cameras = orbit(angle + torch.tensor([0.0, 90.0]), angle, 3 * one, 40 * one, 8, 8)
    camera = phi_conditioning(CFGConditions(front, empty, plain=blind, cameras=cameras), 2).camera
    torch.testing.assert_close(camera, camera_embedding(cameras), rtol=0, atol=0)
    assert not phi_conditioning(CFGConditions(front, empty, plain=blind), 2).camera.any()


def test_phi_may_adapt_a_sibling_of_the_prior(tiny, tmp_path):
    sibling = tiny_folder(tmp_path / "sibling", kind="v_prediction")
    phi = build_score_model(ScoreModelConfig(model=str(sibling)), tiny, Rng())
    x_t, t, conditioning = query(tiny)
    # The same random UNet, read as a velocity.
    prediction = phi.predict(x_t, t, conditioning)
    assert prediction.kind == "v_prediction"
    torch.testing.assert_close(prediction.output, base_output(tiny, x_t, t, conditioning), rtol=0, atol=1e-5)
    assert not any("unet" in name for name in phi.state_dict())
    phi.to("meta")  # stands for any device
    devices = {name: value.device.type for name, value in phi._points.network.state_dict().items()}
    assert set(devices.values()) == {"meta"} and tiny.device.type == "cpu"


def test_wrong_choices_are_refused_in_one_sentence(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"^phi\.network: this prior has no network .* use network=unet"):
        build_score_model(ScoreModelConfig(network="lora"), blobs(), Rng())
    other_text = tiny_folder(tmp_path / "text", text_width=64)
    with pytest.raises(ValueError, match=r"guidance\.phi\.model: .* text embeddings of width 64, .* computes 128"):
        build_score_model(ScoreModelConfig(model=str(other_text)), tiny, Rng())
    other_timesteps = tiny_folder(tmp_path / "timesteps", beta_schedule="linear")
    with pytest.raises(ValueError, match=r"guidance\.phi\.model: the noise schedule of .* is not the prior's"):
        build_score_model(ScoreModelConfig(model=str(other_timesteps)), tiny, Rng())
    assert ScoreModelConfig().validate() == []
    assert ScoreModelConfig(network="unet", model="x", channels=[6]).validate() == [
        "channels: needs one or more multiples of 4, got [6]",
        "model: has no effect with network=unet; use network=lora",
    ]


@pytest.mark.gpu
def test_on_a_gpu_the_adapters_stay_in_single_precision_and_train():
    prior = prior_of("embedded").requires_grad_(False)
    phi = build_score_model(ScoreModelConfig(), prior, Rng())
    before = state_of(phi)
    prior.to("cuda")
    phi.to("cuda")
    assert prior.denoiser.network.dtype == torch.float16
    assert same_state({name: value.cpu() for name, value in state_of(phi).items()}, before)
    x_t, t, conditioning = query(prior)
    x_t, t, conditioning = x_t.to("cuda"), t.to("cuda"), replace(conditioning, camera=conditioning.camera.to("cuda"))
    pair = (phi.predict(x_t, t, conditioning).output, base_output(prior, x_t, t, conditioning))
    torch.testing.assert_close(*pair, rtol=1e-2, atol=1e-2)  # half precision
    train_a_little(phi, x_t, t, conditioning)
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in phi.parameters())
