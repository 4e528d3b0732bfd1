"""Training of LMC's corrective: the regression against the Wiener filter, the knee, and the script from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_corrective
from PIL import Image
from prior_training.corrective import (
    CleanLatents,
    Holdout,
    Recipe,
    at_knee,
    balance,
    batches,
    fit,
    pictured_latents,
    rendered_latents,
    sampled_latents,
)
from torch import Tensor, nn

from scoredist3d.guidance.core.corrective import load_corrective
from scoredist3d.priors import Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior

SIDE, LEVEL = 7, 0.15


class Field(GaussianMixturePrior):
    """A stationary Gaussian field with a 1/f^2 spectrum: its exact denoiser is a gain for each frequency."""

    def __init__(self) -> None:
        super().__init__(GaussianMixturePrior.Config(image_size=SIDE))
        f = torch.fft.fftfreq(SIDE, dtype=torch.float64) * SIDE
        self.frequency = (f[:, None] ** 2 + f[None, :] ** 2).sqrt()
        self.power = 1.0 / (1.0 + self.frequency**2)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (1, height, width)

    def draw(self, count: int, seed: int) -> Tensor:
        white = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        return filtered(white, self.power.sqrt())

    def gain(self, t: Tensor) -> Tensor:
        """(SIDE, SIDE), B_t = alpha^2 S / (alpha^2 S + sigma^2)."""
        alpha, sigma = self.schedule.coefficients(t.double())
        return alpha**2 * self.power / (alpha**2 * self.power + sigma**2)

    def predict(self, x_t, t, conditioning) -> Prediction:
        x0 = filtered(x_t, self.gain(t[:1])) / self.schedule.alpha(t)[0]
        return Prediction(x0, "sample", x_t, t, self.schedule)


def filtered(x: Tensor, gain: Tensor) -> Tensor:
    return torch.fft.ifft2(torch.fft.fft2(x) * gain.to(x.dtype)).real


class Linear(nn.Module):
    """One convolution over the whole, periodic image: any gain per frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.utils.skip_init(nn.Conv2d, 1, 1, SIDE, padding=SIDE // 2, padding_mode="circular")
        nn.init.dirac_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.convolution(z)

    def gain(self) -> Tensor:
        impulse = torch.zeros(1, 1, SIDE, SIDE)
        impulse[..., 0, 0] = 1.0
        return torch.fft.fft2(self(impulse, torch.zeros(1)) - self.convolution.bias.view(1, 1, 1, 1)).real[0, 0]


@pytest.fixture(scope="module")
def fitted() -> tuple[Field, Linear, Holdout]:
    """A linear corrective of the field at one level."""
    prior = Field()
    recipe = Recipe(
        steps=600, batch=96, lr=0.02, ema=0.99, t_min=LEVEL, t_max=LEVEL, evaluations=5, patience=5, balance=0
    )
    unconditional = prior.embed([""])
    held = Holdout.make(
        prior, CleanLatents(prior.draw(4096, 2), unconditional), recipe, torch.Generator().manual_seed(3)
    )
    clean = CleanLatents(prior.draw(20000, 1), unconditional)
    network = Linear()
    result = fit(network, prior, clean, held, recipe, torch.Generator().manual_seed(0), lambda text: None)
    assert result.steps == recipe.steps
    return prior, result.network, held


def test_a_linear_corrective_learns_the_wiener_filter(fitted):
    prior, network, _ = fitted
    gain = prior.gain(torch.tensor([LEVEL]))
    torch.testing.assert_close(network.gain().double(), gain, rtol=0, atol=0.015)
    assert abs(network.convolution.bias.item()) < 0.01
    # It is a low-pass filter, which a constant gain would not be.
    order = prior.frequency.flatten().argsort()
    learnt = network.gain().flatten()[order]
    assert learnt[0] > 0.75 and learnt[-1] < 0.25
    falling = [learnt[prior.frequency.flatten()[order].round() == ring].mean().item() for ring in range(5)]
    assert falling == sorted(falling, reverse=True)


def test_the_filter_takes_away_what_grows_with_frequency_and_leaves_nothing_behind(fitted):
    """Power of the mean of z - x0_u over the noise, per frequency, before and after."""
    prior, network, held = fitted
    gain = prior.gain(torch.tensor([LEVEL])).float()

    def share(difference: Tensor) -> Tensor:
        """Per frequency, of the power of z."""
        return torch.fft.fft2(difference).abs().square().mean((0, 1)) / torch.fft.fft2(held.z).abs().square().mean(
            (0, 1)
        )

    mean_prediction = filtered(held.z, gain)
    before, after = share(held.z - mean_prediction), share(network(held.z, held.t) - mean_prediction)
    order = prior.frequency.flatten().argsort()
    rows = before.flatten()[order]
    assert rows[-1] > 5 * rows[1] > 0
    assert after.max() < 0.01 * before.max()


def test_the_loss_reaches_its_floor(fitted):
    prior, network, held = fitted
    used = held.identity > 0
    assert used.sum() == 1
    error, floor, identity = (x[used].item() for x in (held.error(network), held.floor, held.identity))
    # The floor is estimated from 4096 x 49 differences of two draws: well within 3 %.
    assert floor < identity and error == pytest.approx(floor, rel=0.03)
    gain, power = prior.gain(torch.tensor([LEVEL])), prior.power
    alpha, sigma = prior.schedule.coefficients(torch.tensor([LEVEL], dtype=torch.float64))
    noise = (gain * sigma / alpha).square()
    assert floor == pytest.approx(noise.mean().item(), rel=0.03)
    assert identity == pytest.approx(((1 - gain).square() * power + noise).mean().item(), rel=0.03)


def test_the_knee_is_where_measurements_stop_winning():
    recipe = Recipe(knee=0.01, patience=2)
    assert not at_knee([1.0, 0.5], recipe)
    assert not at_knee([1.0, 0.5, 0.4, 0.39], recipe)
    assert at_knee([1.0, 0.5, 0.4, 0.399, 0.398], recipe)
    assert at_knee([1.0, 0.5, 0.4, 0.45, 0.46], recipe)  # rising: it learns the pictures


def blobs() -> GaussianMixturePrior:
    return GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8))


def test_training_stops_at_the_knee_with_its_best_network():
    prior = blobs()
    recipe = Recipe(steps=400, batch=4, lr=0.3, evaluations=40, patience=3, knee=0.05, ema=0.5, balance=0)
    clean = sampled_latents(prior, 40, torch.Generator().manual_seed(0), prompts=["red"], steps=4, scale=1.0)
    held = Holdout.make(prior, clean, recipe, torch.Generator().manual_seed(1))

    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return z + self.bias

    said: list[str] = []
    result = fit(Bias(), prior, clean, held, recipe, torch.Generator().manual_seed(2), said.append)
    assert result.steps < recipe.steps and said[-1] == f"knee reached at step {result.steps}"
    measured = [float(text.split("held-out ")[1].split(",")[0]) for text in said[:-1]]
    assert float(result.error.mean()) == pytest.approx(min(measured), abs=1e-4)


def test_kept_targets_are_a_fixed_set_and_fresh_ones_are_not():
    prior = blobs()
    clean = sampled_latents(prior, 8, torch.Generator().manual_seed(0), prompts=["red"], steps=2, scale=1.0)
    for targets, distinct in ((5, 5), (0, 60)):
        source = batches(prior, clean, Recipe(batch=10, targets=targets), torch.Generator().manual_seed(1))
        levels = torch.cat([next(source)[1] for _ in range(6)])
        assert len(levels.unique()) == pytest.approx(distinct, abs=0 if targets else 8)


def test_balanced_levels_weigh_their_error_by_the_identitys():
    prior = blobs()
    clean = sampled_latents(prior, 100, torch.Generator().manual_seed(0), prompts=["red"], steps=2, scale=1.0)
    recipe = Recipe()
    held = Holdout.make(prior, clean, recipe, torch.Generator().manual_seed(1))
    assert held.identity[-1] > 3 * held.identity[0] > 0
    weighted = held.identity * balance(held, recipe)
    # Products x * (1 / x), rounded: 1 for every level whose error is not far below the largest.
    kept = held.identity >= 1e-3 * held.identity.max()
    assert kept[-1]
    torch.testing.assert_close(weighted[kept], torch.ones_like(weighted[kept]), rtol=1e-6, atol=0)
    assert (weighted[~kept] < 1).all()
    assert torch.equal(balance(held, replace(recipe, balance=0)), torch.ones_like(held.identity))


def test_pictures_are_cropped_encoded_and_must_be_there(tmp_path: Path):
    for index, size in enumerate(((20, 10), (8, 8))):
        Image.new("RGB", size, (255 * index, 0, 0)).save(tmp_path / f"{index}.png")
    clean = pictured_latents(blobs(), tmp_path, torch.device("cpu"))
    assert clean.z.shape == (2, 3, 8, 8) and len(clean.unconditional) == 1
    assert clean.z[:, 0].mean((1, 2)).tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match=r"--images: .* contains 0 images"):
        pictured_latents(blobs(), tmp_path / "none", torch.device("cpu"))


def test_renders_come_with_their_cameras():
    clean = rendered_latents(blobs(), 3, torch.Generator().manual_seed(0))
    assert clean.z.shape == (3, 3, 8, 8) and len(clean.unconditional) == 3 and clean.unconditional.camera is None

    class Seeing(GaussianMixturePrior):
        takes_cameras = True

        def camera_condition(self, cameras, batch):
            return cameras.c2w.flatten(1)

    clean = rendered_latents(Seeing(GaussianMixturePrior.Config(image_size=8)), 20, torch.Generator().manual_seed(0))
    blind = (clean.unconditional.camera == 0).all(1)
    assert clean.unconditional.camera.shape == (20, 16) and 0 < blind.sum() < 12


def test_the_script_writes_a_corrective_that_lmc_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    block = "{type: gaussian-mixture, image_size: 8}"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red blob\n\nblue blob\n")
    arguments = ["--prior", block, "--out", str(tmp_path / "b"), "--device", "cpu", "--prompts", str(prompts)]
    sizes = ["--latents", "24", "--holdout", "40", "--steps", "6", "--batch", "4", "--evaluations", "2", "--width", "8"]
    before = torch.random.get_rng_state()
    assert train_corrective.main([*arguments, *sizes, "--sampling-steps", "2"]) == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    network = load_corrective(str(tmp_path / "b"), blobs())
    assert network is not None and network.sizes.width == 8
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["latent_shape"] == [3, 8, 8] and config["recipe"]["batch"] == 4 and config["steps"] == 6
    card = (tmp_path / "b" / "README.md").read_text()
    assert "2 prompts" in card and "What of LMC is not verified" in card and f"--prior {block}" in card
    rows = [line for line in card.splitlines() if line.startswith("| 0.")]
    assert len(rows) == 10 and all(len(row.split("|")) == 7 for row in rows)
    assert "held-out" in capsys.readouterr().out and sorted(file.name for file in (tmp_path / "b").iterdir()) == [
        "README.md",
        "config.json",
        "corrective.safetensors",
    ]
