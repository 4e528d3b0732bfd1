"""The training script of the flow prior in miniature: train, resume, export, load; what a small model learns."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate_words
import pytest
import torch
import train_flow_prior
from prior_training.flow import FlowModel, mixed_batch, random_timesteps, standardize, train_flow
from prior_training.flow_models import FlowSizes, build_clip, build_transformer, save_flow_prior, zero_modulation
from prior_training.pool import DenoiserBatch
from safetensors.torch import load_file
from shared.flow_folder import build_vae

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.priors import CFGConditions, camera_embedding, sample
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural import build_tokenizer
from scoredist3d.procedural.reader import Reader


def arguments(folder: Path, *options: str) -> list[str]:
    return [
        *("--miniature", "--device", "cpu", "--work", str(folder / "work"), "--out", str(folder / "assets")),
        *options,
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    assert train_flow_prior.main(arguments(folder)) == 0
    return folder


def load(folder: Path) -> DiffusersPrior:
    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(folder)))


def test_miniature_is_a_loadable_camera_conditioned_prior(trained: Path) -> None:
    prior = load(trained / "assets" / "prior-flow")
    assert prior.takes_cameras and prior.schedule.prediction_type == "v_prediction"
    assert prior.unknown_words("a red mug") == [] == prior.unknown_words("a sign that says 'AB12'")
    assert prior.nouns is not None and prior.nouns.known_in("a sign") == ["sign"]
    quoted, spelled, bare = (prior.embed([f"a sign that says {text}"]).text for text in ("'AB1'", "a b 1", "ab1"))
    torch.testing.assert_close(quoted, spelled)
    assert not torch.allclose(quoted, bare)
    size = prior.image_size
    z = prior.encode(torch.rand(2, size, size, 3, generator=torch.Generator().manual_seed(0)))
    assert z.shape == (2, *prior.latent_shape(size, size))
    latents = sample(
        prior, CFGConditions(prior.embed(["a red mug"]), prior.embed([""])), steps=2, generator=torch.Generator()
    )
    assert latents.isfinite().all()


def test_weights_are_half_precision_safetensors(trained: Path) -> None:
    folder = trained / "assets" / "prior-flow"
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        (file,) = (folder / part).glob("*.safetensors")
        types = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert types == {torch.float16}
    assert not list(folder.rglob("*.bin"))


def test_rerun_resumes_at_the_end_and_changes_nothing(trained: Path) -> None:
    weights = trained / "assets" / "prior-flow" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    assert train_flow_prior.main(arguments(trained, "--export-only")) == 0
    assert weights.read_bytes() == before
    assert train_flow_prior.main(arguments(trained)) == 0
    assert weights.read_bytes() == before
    assert json.loads((trained / "work" / "recipe.json").read_text())["recipe"]["flow_steps"] == 6


def test_a_trained_autoencoder_is_used(trained: Path, tmp_path: Path) -> None:
    options = arguments(tmp_path, "--vae", str(trained / "work" / "vae"), "--flow-steps", "1", "--objects", "2")
    assert train_flow_prior.main(options) == 0
    weights = [folder / "work" / "vae" / "diffusion_pytorch_model.safetensors" for folder in (trained, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "work" / "vae.pt").exists()


def test_a_training_continues_from_an_exported_prior(trained: Path, tmp_path: Path) -> None:
    options = ["--init", str(trained / "assets"), "--flow-steps", "1", "--peak-lr", "0", "--objects", "2"]
    assert train_flow_prior.main(arguments(tmp_path, *options)) == 0
    for part in ("vae", "transformer", "text_encoder"):
        before, after = (
            load_file(next((folder / "assets" / "prior-flow" / part).glob("*.safetensors")))
            for folder in (trained, tmp_path)
        )
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    facts = [json.loads((folder / "work" / "vae" / "config.json").read_text()) for folder in (trained, tmp_path)]
    assert facts[0]["scaling_factor"] == facts[1]["scaling_factor"]


def test_words_of_samples_are_read(trained: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Reader(width=8).save(tmp_path / "reader")
    options = ["--prior", str(trained / "assets" / "prior-flow"), "--reader", str(tmp_path / "reader")]
    options += ["--out", str(tmp_path), "--device", "cpu", "--count", "4", "--steps", "1", "--scales", "1"]
    assert evaluate_words.main(options) == 0
    table = json.loads((tmp_path / "words.json").read_text())
    assert list(table) == ["real renders", "real renders, encoded", "1 steps, scale 1"]
    assert all(0.0 <= row["exact"] <= row["characters"] <= 1.0 for row in table.values())
    assert (tmp_path / "words.png").stat().st_size > 1000


def test_export_only_without_states_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_flow_prior.main(arguments(tmp_path, "--export-only")) == 1
    assert "no saved flow state yet" in capsys.readouterr().err


class Signs:
    """Latents whose first half of channels has the sign of the caption, and the second half that of the camera."""

    def __init__(self, tokenizer, views: Cameras) -> None:  # type: ignore[no-untyped-def]
        ids = tokenizer(["a red mug", "a blue chair", ""], padding="max_length", return_tensors="pt").input_ids
        self.ids, self.cameras, self.refreshed = ids, camera_embedding(views), 0

    def random_batch(self, count: int, generator: torch.Generator) -> DenoiserBatch:
        caption, camera = torch.randint(0, 2, (2, count), generator=generator)
        signs = 1.0 - 2.0 * torch.stack([caption, camera], dim=1)
        latents = signs.repeat_interleave(2, dim=1)[:, :, None, None].expand(-1, -1, 4, 4) + 0.5
        empty = torch.rand(count, generator=generator) < 0.1
        ids = torch.where(empty[:, None], self.ids[2], self.ids[caption])
        return DenoiserBatch(latents, ids, self.cameras[camera])

    def refresh(self, filling: int) -> None:
        self.refreshed += 1


def test_captions_and_cameras_reach_the_samples_of_an_exported_model(tmp_path: Path) -> None:
    """The conditioning of training is that of the prior: context, pooled text, camera token, timestep and shift."""
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    sizes = FlowSizes.miniature()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = build_transformer(sizes, 4, 4)
        zero_modulation(transformer)
        model = FlowModel(transformer, build_clip(sizes, tokenizer), build_clip(sizes, tokenizer))
        vae = build_vae(channels=4)
    ahead = torch.tensor([0.0, 180.0])
    views = orbit(ahead, torch.full((2,), 20.0), torch.full((2,), 3.2), torch.full((2,), 40.0), 32, 32)
    source = Signs(tokenizer, views)
    averaged = train_flow(
        model,
        [(source, 1.0)],
        shift=sizes.shift,
        offset=0.5,
        steps=100,
        batch=24,
        work=tmp_path,
        generator=torch.Generator().manual_seed(0),
        compile_=False,
        refreshes=1,
        peak_lr=1e-2,
        ema_decay=0.9,
    )
    assert source.refreshed == 1
    folder = tmp_path / "prior"
    save_flow_prior(
        folder,
        vae=vae,
        transformer=averaged.transformer,
        text_encoders=(averaged.clip, averaged.clip_2),
        tokenizer=tmp_path / "tokenizer",
        shift=sizes.shift,
    )
    prior = load(folder)
    prompts = ["a red mug", "a red mug", "a blue chair", "a blue chair"]
    both = orbit(ahead.repeat(2), *(torch.full((4,), value) for value in (20.0, 3.2, 40.0)), 32, 32)
    conditions = CFGConditions(prior.embed(prompts, both), prior.embed([""]))
    generator = torch.Generator().manual_seed(1)
    latents = sample(prior, conditions, steps=10, scale=1.0, generator=generator)
    signs = latents.reshape(4, 2, -1).mean(dim=2)
    expected = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    torch.testing.assert_close(signs, expected, atol=0.35, rtol=0)


def test_each_source_gives_its_share() -> None:
    class Constant:
        def __init__(self, value: float) -> None:
            self.value = value

        def random_batch(self, count: int, generator: torch.Generator) -> DenoiserBatch:
            latents = torch.full((count, 1, 1, 1), self.value)
            return DenoiserBatch(latents, torch.zeros(count, 3, dtype=torch.long), torch.zeros(count, 16))

        def refresh(self, filling: int) -> None:
            raise AssertionError

    batch = mixed_batch([(Constant(0.0), 0.6), (Constant(1.0), 0.4)], 21, torch.Generator())
    assert batch.latents.flatten().tolist() == [0.0] * 13 + [1.0] * 8
    assert len(batch.token_ids) == len(batch.camera) == 21
    assert len(mixed_batch([(Constant(0.0), 1.0), (Constant(1.0), 0.0)], 4, torch.Generator()).camera) == 4


def test_timesteps_are_mostly_logit_normal() -> None:
    t = random_timesteps(200_000, torch.Generator().manual_seed(0))
    assert t.min() > 0.0 and t.max() < 1.0
    assert t.mean().item() == pytest.approx(0.5, abs=0.005)
    # Below 0.05: 5 % of uniform timesteps, and P(n < logit(0.05)) of the others.
    tail = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.05).logit()).item()
    assert (t < 0.05).float().mean().item() == pytest.approx(0.1 * 0.05 + 0.9 * tail, abs=0.001)


def test_standardized_latents_have_mean_0_and_deviation_1() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = build_vae()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    standardize(vae, images)
    with torch.no_grad():
        codes = vae.encode(2.0 * images - 1.0).latent_dist.mean
    latents = (codes - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.mean().abs() < 1e-3 and latents.std().item() == pytest.approx(1.0, abs=1e-3)
