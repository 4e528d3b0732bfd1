"""Noise schedules compared with diffusers' schedulers, and their identities in float64."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from scoredist3d.diffusion.samplers import solve_ode
from scoredist3d.diffusion.schedule import CLEAN, FlowSchedule, NoiseSchedule, VPSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
CONFIGS = {
    "stable-diffusion": SD,
    "linear": {"beta_schedule": "linear", "clip_sample": False},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "trained": {
        "trained_betas": np.linspace(0.001, 0.02, 100).tolist(),
        "num_train_timesteps": 100,
        "clip_sample": False,
    },
    "zero-snr": {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def draws(count: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, 4, 5, 5, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("reference", [DDIMScheduler, DDPMScheduler])
def test_tables_and_add_noise_agree_with_diffusers(name, reference):
    scheduler = reference(**CONFIGS[name])
    ours = NoiseSchedule.from_config(scheduler.config)
    n = ours.num_train_timesteps
    t = torch.arange(n, dtype=torch.float64) / n
    # diffusers accumulates the product in float32: 1000 factors, so up to a few hundred roundings of 6e-8.
    torch.testing.assert_close(ours.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=2e-6)
    assert torch.equal(ours.model_timestep(t), torch.arange(n))
    z, eps = draws()
    steps = torch.tensor([0, n // 3, n // 2, n - 1])
    expected = scheduler.add_noise(z, eps, steps)
    torch.testing.assert_close(ours.add_noise(z, eps, steps / n), expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(
    "options", [{}, {"steps_offset": 1}, {"steps_offset": 1, "timestep_spacing": "trailing"}], ids=str
)
def test_steps_offset_is_the_lowest_timestep_of_diffusers_grid(options):
    scheduler = DDIMScheduler(**{**SD, **options})
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    lowest = scheduler.timesteps.min().item()
    assert NoiseSchedule.from_config(scheduler.config).steps_offset == lowest
    assert NoiseSchedule.from_config({**SD, **options}).steps_offset == lowest


def test_known_values_of_stable_diffusion():
    ours = VPSchedule.stable_diffusion()
    t = torch.tensor([0.0, 0.999, 0.5, 0.02, 1.0, CLEAN], dtype=torch.float64)
    abar = ours.alpha(t) ** 2
    assert abar[0].item() == pytest.approx(0.99915, abs=1e-9)
    assert abar[1].item() == pytest.approx(0.004660, abs=5e-7)
    assert ours.lambda_(t)[1:4].tolist() == pytest.approx([14.61, 1.618, 0.138], rel=2e-3)
    assert abar[4] == abar[1]  # t = 1 is the last timestep
    assert (ours.alpha(t)[5].item(), ours.sigma(t)[5].item()) == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", CONFIGS)
def test_step_and_predicted_image_agree_with_ddim(name, kind):
    if name == "zero-snr" and kind == "epsilon":
        pytest.skip("an eps model says nothing about x_0 at the timestep without signal")
    scheduler = DDIMScheduler(**CONFIGS[name], prediction_type=kind)
    ours = NoiseSchedule.from_config(scheduler.config)
    n = ours.num_train_timesteps
    scheduler.set_timesteps(10)
    x, output = draws(1)
    stride = n // 10
    for k in (0, 4, 8):
        timestep = int(scheduler.timesteps[k])
        expected = scheduler.step(output, timestep, x)
        t, s = torch.tensor([timestep / n]), torch.tensor([(timestep - stride) / n])
        x0, eps = ours.to_x0(output, x, t), ours.to_eps(output, x, t)
        scale = expected.pred_original_sample.abs().max()
        assert (x0 - expected.pred_original_sample).abs().max() <= 1e-4 * scale
        assert (ours.ddim_step(eps, x0, t, s) - expected.prev_sample).abs().max() <= 1e-4 * scale


CHAINS = {
    "ddim": DDIMScheduler(),
    "ddim-lowest": DDIMScheduler(**SD, set_alpha_to_one=False),
    "ddpm": DDPMScheduler(),
    "pndm": PNDMScheduler(),
    "euler": EulerDiscreteScheduler(),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_final_timestep_is_that_of_a_ddim_scheduler_of_the_same_configuration(name, loaded):
    scheduler = CHAINS[name]
    config = scheduler.config if loaded else json.loads(scheduler.to_json_string())  # scheduler_config.json
    ours = NoiseSchedule.from_config(config)
    final = ours.alpha(torch.tensor([ours.final_timestep], dtype=torch.float64)).item() ** 2
    for reference, end in ((DDIMScheduler, "final_alpha_cumprod"), (DDIMInverseScheduler, "initial_alpha_cumprod")):
        expected = getattr(reference.from_config(config), end).item()
        assert final == pytest.approx(expected, abs=1e-6)
        assert (ours.final_timestep == CLEAN) == (expected == 1.0)


def test_final_timestep_of_stable_diffusion_is_the_lowest_and_a_flow_ends_clean():
    assert VPSchedule.stable_diffusion().final_timestep == 0.0
    assert FlowSchedule().final_timestep == CLEAN


def test_ancestral_step_agrees_with_ddim():
    scheduler = DDIMScheduler(**SD, prediction_type="v_prediction")
    ours = NoiseSchedule.from_config(scheduler.config)
    scheduler.set_timesteps(10)
    x, output = draws(1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    expected = scheduler.step(output, 500, x, eta=0.7, variance_noise=noise).prev_sample
    t, s = torch.tensor([0.5]), torch.tensor([0.4])
    eps, x0 = ours.to_eps(output, x, t), ours.to_x0(output, x, t)
    step = ours.ddim_step(eps, x0, t, s, eta=0.7, noise=noise)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="noise"):
        ours.ddim_step(eps, x0, t, s, eta=0.7)


@pytest.mark.parametrize("steps", [1, 7, 10, 25, 30])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_timesteps_are_diffusers_trailing_ones(steps, prediction_type):
    scheduler = DDIMScheduler(**SD, timestep_spacing="trailing", prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    ours = NoiseSchedule.from_config(scheduler.config)
    timesteps = ours.timesteps(steps)
    assert timesteps[-1] == CLEAN and len(timesteps) == steps + 1
    assert ours.model_timestep(torch.tensor(timesteps[:-1])).tolist() == scheduler.timesteps.tolist()


def test_sampling_trajectory_equals_ddim_in_float64():
    # DDIM on the exact denoiser of N(m, s^2): with set_alpha_to_one the end is our clean timestep.
    scheduler = DDIMScheduler(**SD, timestep_spacing="trailing", set_alpha_to_one=True)
    ours = VPSchedule.stable_diffusion()
    scheduler.alphas_cumprod = ours.alpha(torch.arange(1000, dtype=torch.float64) / 1000) ** 2
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(20)
    m, s = 0.3, 0.6

    def eps_of(x, t):
        alpha, sigma = (c[:, None, None, None] for c in ours.coefficients(t))
        return sigma * (x - alpha * m) / (alpha**2 * s**2 + sigma**2)

    def predict(x, t):
        eps = eps_of(x, t)
        return eps, ours.to_x0(eps, x, t)

    x, _ = draws(3, torch.float64)
    trail = []
    end = solve_ode(ours, predict, x, ours.timesteps(20), callback=lambda i, t, x, x0: trail.append((x, x0)))
    y = x
    for index, timestep in enumerate(scheduler.timesteps):
        out = scheduler.step(eps_of(y, torch.full((3,), timestep / 1000.0, dtype=torch.float64)), timestep, y)
        y = out.prev_sample
        torch.testing.assert_close(trail[index][1], out.pred_original_sample, rtol=0, atol=1e-11)
        torch.testing.assert_close(trail[index][0], y, rtol=0, atol=1e-11)
    assert torch.equal(end, trail[-1][0])


def test_inversion_undoes_sampling_as_steps_grow():
    ours = VPSchedule.stable_diffusion()
    z, _ = draws(2, torch.float64)

    def predict(x, t):  # data N(0, 0.5^2)
        alpha, sigma = (c[:, None, None, None] for c in ours.coefficients(t))
        spread = alpha**2 * 0.25 + sigma**2
        return sigma * x / spread, alpha * 0.25 * x / spread

    errors = []
    for steps in (10, 40, 160):
        up = list(reversed(ours.timesteps(steps, start=0.9)))
        back = solve_ode(ours, predict, solve_ode(ours, predict, z, up), ours.timesteps(steps, start=0.9))
        errors.append((back - z).abs().max().item())
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    assert errors[2] < 0.1 * z.abs().max()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_agrees_with_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = NoiseSchedule.from_config(scheduler.config)
    assert isinstance(ours, FlowSchedule)
    # The scheduler's training table holds k = 1000..1 after the shift.
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(ours.sigma(t), scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.model_timestep(t), scheduler.timesteps.double(), rtol=1e-6, atol=1e-4)
    assert torch.equal(ours.quantize(t), t)
    z, eps = draws(4)
    picked = scheduler.timesteps[[0, 300, 700, 999]]
    torch.testing.assert_close(
        ours.add_noise(z, eps, t[[0, 300, 700, 999]].float()),
        scheduler.scale_noise(z, picked, eps),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_trajectory_is_the_euler_trajectory(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = FlowSchedule(shift)
    scheduler.set_timesteps(sigmas=[1.0 - k / 8 for k in range(8)])
    x, target = draws(2)

    def velocity(x):
        return torch.tanh(x - target)

    def predict(x, t):
        return ours.to_eps(velocity(x), x, t), ours.to_x0(velocity(x), x, t)

    end = solve_ode(ours, predict, x, ours.timesteps(8))
    y = x
    for timestep in scheduler.timesteps:
        y = scheduler.step(velocity(y), timestep, y).prev_sample
    torch.testing.assert_close(end, y, rtol=1e-5, atol=1e-5)


def test_dynamic_shift_is_the_pipelines_mu():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=mu)
    ours = NoiseSchedule.from_config(config, image_tokens=1024)
    sigma = ours.sigma(torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64))
    torch.testing.assert_close(sigma, scheduler.sigmas[:3].double(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="image_tokens"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("make", [VPSchedule.stable_diffusion, FlowSchedule, lambda: FlowSchedule(3.0)])
def test_conversions_are_inverse_to_each_other(make):
    schedule = make()
    x0, eps = draws(4, torch.float64)
    t = torch.tensor([0.02, 0.3, 0.5, 0.98], dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = (c[:, None, None, None] for c in schedule.coefficients(t))
    v = alpha * eps - sigma * x0 if isinstance(schedule, VPSchedule) else eps - x0
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": v}
    for kind, output in outputs.items():
        torch.testing.assert_close(schedule.to_eps(output, x_t, t, kind), eps, rtol=0, atol=1e-12)
        torch.testing.assert_close(schedule.to_x0(output, x_t, t, kind), x0, rtol=0, atol=1e-12)
        torch.testing.assert_close(schedule.to_v(output, x_t, t, kind), v, rtol=0, atol=1e-12)


def test_velocity_models_are_finite_without_signal():
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule = NoiseSchedule.from_config(config)
    x, v = draws(1, torch.float64)
    t = torch.tensor([0.999], dtype=torch.float64)
    assert schedule.alpha(t).item() == 0.0
    assert torch.equal(schedule.to_x0(v, x, t), -v)
    assert torch.equal(schedule.to_eps(v, x, t), x)
    assert schedule.lambda_(t).item() == float("inf") and schedule.log_snr(t).item() == -float("inf")


def test_timesteps_are_quantized_in_every_dtype():
    schedule = VPSchedule.stable_diffusion()
    for dtype in (torch.float32, torch.float64):
        t = torch.arange(1000, dtype=dtype) / 1000
        assert torch.equal(schedule.model_timestep(t), torch.arange(1000))
        assert torch.equal(schedule.quantize(t + 3e-4), t)
        assert schedule.alpha(t).dtype == dtype
    assert schedule.model_timestep(torch.tensor([0.5])).item() == 500
    assert schedule.log_snr(torch.tensor([0.2, 0.8], dtype=torch.float64)).diff().item() < 0


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid'"):
        NoiseSchedule.from_config({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="prediction_type"):
        NoiseSchedule.from_config({**SD, "prediction_type": "noise"})
    with pytest.raises(ValueError, match="positive"):
        FlowSchedule(0.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        VPSchedule.stable_diffusion().timesteps(0)


@pytest.mark.parametrize(
    "schedule", [VPSchedule.stable_diffusion(), FlowSchedule(), FlowSchedule(shift=3.0)], ids=["vp", "flow", "shifted"]
)
@pytest.mark.parametrize(("high", "low"), [(0.9, 0.675), (0.45, 0.225), (0.101, 0.001)])
def test_ancestral_variance_is_that_of_the_forward_chain(schedule: NoiseSchedule, high: float, low: float) -> None:
    t, s = torch.tensor([high], dtype=torch.float64), torch.tensor([low], dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.coefficients(t), schedule.coefficients(s)
    # x_t = k x_s + sqrt(v) xi: condition the joint Gaussian of (x_s, x_t) given x_0 on x_t.
    k = alpha_t / alpha_s
    v = sigma_t**2 - k**2 * sigma_s**2
    posterior = sigma_s**2 - (k * sigma_s**2) ** 2 / (k**2 * sigma_s**2 + v)
    assert torch.all(v > 0)
    torch.testing.assert_close(schedule.ddim_variance(t, s), posterior, rtol=1e-9, atol=1e-12)
    # An ancestral step keeps the noise that belongs to its timestep.
    eps, noise = torch.randn(2, 1, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = torch.zeros_like(eps)
    stepped = schedule.ddim_step(eps, x0, t, s, eta=1.0, noise=noise)
    assert float(stepped.std()) == pytest.approx(float(sigma_s), rel=0.01)  # standard error 0.0022


@pytest.mark.parametrize("steps", [4, 10, 15])
@pytest.mark.parametrize("start", [0.0, 0.002, 0.006])
def test_trajectories_from_low_timesteps_stay_on_the_chain(steps: int, start: float) -> None:
    timesteps = VPSchedule.stable_diffusion().timesteps(steps, start)
    assert len(timesteps) == steps + 1 and timesteps[-1] == CLEAN
    assert all(0.0 <= later <= timestep <= start for timestep, later in pairwise(timesteps[:-1]))
