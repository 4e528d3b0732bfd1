"""The training script's own code path, in miniature: train, resume, export, load, sample, evaluate."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import evaluate_prior
import pytest
import torch
import train_prior
from diffusers import AutoencoderKL
from prior_training.common import Ema, learning_rate
from prior_training.denoiser import loss_weight
from prior_training.models import LATENT_STD, PriorSizes, build_scheduler, save_networks
from prior_training.pool import Pool, PoolSizes
from torch import Tensor

from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural import CATEGORIES, build_tokenizer
from scoredist3d.procedural.attributes import PATTERN_WEIGHTS, PLAIN
from scoredist3d.procedural.probe import Probe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    arguments = ["--miniature", "--device", "cpu", "--work", str(folder / "work"), "--out", str(folder / "assets")]
    assert train_prior.main(arguments) == 0
    return folder


def test_miniature_is_a_loadable_camera_conditioned_prior(trained: Path) -> None:
    prior = DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(trained / "assets" / "prior")))
    sizes = PriorSizes.miniature()
    size, shape = sizes.image_size, (sizes.latent_channels, sizes.latent_size, sizes.latent_size)
    assert (prior.image_size, prior.latent_shape(size, size)) == (size, shape)
    assert prior.unknown_words("a red mug") == []
    assert prior.unknown_words("a red zeppelin") == ["zeppelin"]
    assert prior.nouns is not None and prior.nouns.known_in("an object") == ["object"]
    assert list(prior.nouns.kinds) == list(CATEGORIES)
    z = prior.encode(torch.rand(2, size, size, 3, generator=torch.Generator().manual_seed(0)))
    assert z.shape == (2, *shape)


def test_weights_are_half_precision_safetensors(trained: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(trained / "assets" / "prior" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not list((trained / "assets").rglob("*.bin"))


def test_saved_networks_do_not_name_the_folder_they_came_from(trained: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(trained / "assets" / "prior" / "vae")
    assert vae.config._name_or_path
    save_networks(tmp_path, {"vae": vae}, torch.float16)
    assert "_name_or_path" not in json.loads((tmp_path / "vae" / "config.json").read_text())
    again = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert again.config.scaling_factor == vae.config.scaling_factor


def test_rerun_resumes_at_the_end_and_changes_nothing(trained: Path) -> None:
    weights = trained / "assets" / "prior" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    arguments = ["--miniature", "--device", "cpu", "--work", str(trained / "work"), "--out", str(trained / "assets")]
    assert train_prior.main(arguments) == 0
    assert weights.read_bytes() == before
    assert json.loads((trained / "work" / "recipe.json").read_text())["recipe"]["denoiser_steps"] == 6


def test_export_only_without_states_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--miniature",
        "--device",
        "cpu",
        "--export-only",
        "--work",
        str(tmp_path / "w"),
        "--out",
        str(tmp_path),
    ]
    assert train_prior.main(arguments) == 1
    assert "no saved denoiser state yet" in capsys.readouterr().err


def test_evaluation_writes_its_tables(trained: Path, tmp_path: Path) -> None:
    arguments = ["--prior", str(trained / "assets" / "prior"), "--probe", str(trained / "assets" / "probe")]
    arguments += ["--out", str(tmp_path), "--device", "cpu", "--per-pair", "1", "--steps", "1", "--scales", "1"]
    assert evaluate_prior.main([*arguments, "--limit", "24"]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(result["accuracy"]) == {
        "real renders, plain",
        "real renders",
        "real renders, encoded",
        "DDIM-1, scale 1",
    }
    for title in ("scenes", "patterns"):
        assert {"visible", "samples", "renders"} <= set(result[title])
    # Real degraded renders: each defect has its effect; those of an untrained network have none.
    real = {name: row for name, row in result["defects"].items() if name.startswith("renders")}
    intact = real["renders, no defect"]
    assert real["renders, blurry"]["sharpness"] < 0.7 * intact["sharpness"]
    assert real["renders, oversaturated"]["saturation"] > 1.2 * intact["saturation"]
    assert real["renders, noisy"]["noise"] > intact["noise"] + 0.02
    assert all(0.0 <= row["category"] <= 1.0 for row in result["accuracy"].values())
    # An untrained network does not listen: wrong words cost it nothing.
    assert all(abs(row["color"] - 1.0) < 0.2 for row in result["where_conditioning_acts"])
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_probe_azimuth_error_respects_symmetry() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(["a"], ["b"], ["c"], width=8)
    reading = probe(torch.rand(4, 64, 64, 3, generator=torch.Generator().manual_seed(0)))
    predicted = torch.atan2(reading.direction[:, 1, 1], reading.direction[:, 1, 0]) / 2  # order 2
    order = torch.tensor([2, 2, 2, 0])
    azimuth = predicted + torch.tensor([0.0, torch.pi, 0.1, 0.0])
    error = reading.azimuth_error_deg(azimuth, order)
    torch.testing.assert_close(error[:3], torch.rad2deg(torch.tensor([0.0, 0.0, 0.1])), atol=1e-3, rtol=0)
    assert error[3].isnan()


def test_learning_rate_shape() -> None:
    rates = [learning_rate(step, 1000, 1.0, warmup=100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == 1.0 and rates[500] == 1.0
    assert rates[1000] == pytest.approx(0.01)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_ema_follows_the_weights() -> None:
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1, bias=False)
    ema = Ema(layer, 0.9)
    torch.nn.init.zeros_(ema.module.weight)
    torch.nn.init.ones_(layer.weight)
    expected = 0.0
    for step in range(1, 50):
        ema.update(layer)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_weight_of_the_loss_is_between_those_of_edm_and_the_v_prediction() -> None:
    alphas_bar = build_scheduler().alphas_cumprod
    alpha, sigma = alphas_bar.sqrt(), (1 - alphas_bar).sqrt()
    edm = ((alpha * LATENT_STD) ** 2 + sigma**2) / (LATENT_STD * sigma) ** 2
    expected = (edm / sigma**2).sqrt()
    weight = loss_weight(alpha, sigma)
    strong = sigma > LATENT_STD / 2**0.5
    torch.testing.assert_close(weight[strong], expected[strong])
    assert weight.max() < 2 / LATENT_STD**2 * 1.3  # 45,000 at the first timestep without the limit
    assert expected.max() > 20 * weight.max()


def test_share_of_scenes_in_a_batch(tmp_path: Path) -> None:
    sizes = PoolSizes(objects=30, scenes=10, lettered=5, views=2)
    options: dict[str, Any] = {"image_size": 64, "antialias": 1, "device": torch.device("cpu"), "compile_": False}
    pool = Pool(build_tokenizer(tmp_path), sizes, seed=0, **options)
    generator = torch.Generator().manual_seed(0)
    index = pool.random_index(4000, generator, scenes=0.6)
    assert abs((index >= 60).float().mean().item() - 0.6) < 0.04
    assert index.max().item() == 79 and len(index.unique()) == 80
    assert abs((pool.random_index(4000, generator) >= 60).float().mean().item() - 0.25) < 0.04


@pytest.mark.parametrize(("patterned", "plain"), [(1.0, 0.0), (0.5, 0.5 * PATTERN_WEIGHTS[PLAIN])])
def test_share_of_patterned_objects(patterned: float, plain: float, tmp_path: Path) -> None:
    """The share of plain ones shrinks; the equal shares of the other patterns are added to the usual ones."""
    count = 400
    sizes = PoolSizes(objects=count, scenes=0, lettered=0, views=1, patterned=patterned)
    options: dict[str, Any] = {"image_size": 8, "antialias": 1, "device": torch.device("cpu"), "compile_": False}
    pool = Pool(build_tokenizer(tmp_path), sizes, seed=0, **options)
    pool.fill(0)
    shares = pool.views.pattern.bincount(minlength=len(PATTERN_WEIGHTS)) / count
    assert abs(shares[PLAIN].item() - plain) < 0.08
    expected = (1 - patterned) * torch.tensor(PATTERN_WEIGHTS[1:]) + patterned / 5
    assert (shares[1:] - expected).abs().max() < 0.08


def test_probe_finds_two_objects_anywhere_in_the_image() -> None:
    """The presence of a category is the smooth maximum over positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(["a", "b"], ["c"], ["d"], width=8, input_size=64)
    maps: list[Tensor] = []
    probe.heads["present"].register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    present = probe(torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))).present
    assert maps[0].shape == (3, 2, 8, 8)
    assert (present >= maps[0].amax((2, 3))).all()
    torch.testing.assert_close(present, maps[0].exp().sum((2, 3)).log())
