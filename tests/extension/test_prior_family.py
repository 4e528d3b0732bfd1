"""A new prior family is one short file: Stable Diffusion 3 equals the pipeline of diffusers and can be distilled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from shared.custom_packages import forget_custom
from shared.deepfloyd_folder import TEXT_WIDTH, build_t5
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from scoredist3d import cli, registry
from scoredist3d.custom import load_custom
from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors import CFGConditions, sample
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.procedural import build_tokenizer
from scoredist3d.training.fit import import_lightning

import_lightning()  # before the tests: the import draws from a global random stream
FAMILY = Path(__file__).parent / "stable_diffusion_3.py"
NAME = "stable-diffusion-3"
MOST_LINES = 120
PROMPTS = ["a red mug", "a blue chair"]


def build_folder(folder: Path) -> Path:
    """A tiny, randomly initialised folder in the layout of Stable Diffusion 3."""
    with torch.random.fork_rng(devices=[]):  # library modules draw their first weights from the global stream
        torch.manual_seed(0)
        build_t5(folder / "t5")
        for part in ("tokenizer", "text_encoder"):
            (folder / "t5" / part).rename(folder / f"{part}_3")
        for suffix, width in (("", 8), ("_2", 16)):
            tokenizer = build_tokenizer(folder / f"tokenizer{suffix}")
            text = CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                projection_dim=width,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            CLIPTextModelWithProjection(text).save_pretrained(folder / f"text_encoder{suffix}")
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            pos_embed_max_size=16,
        ).save_pretrained(folder / "transformer")
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.06,
        ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    clip, t5 = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "T5EncoderModel"]
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": t5,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5Tokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def custom(tmp_path: Path) -> Iterator[Path]:
    """The family as a user package, registered for one test."""
    packages = tmp_path / "packages"
    packages.mkdir()
    shutil.copy(FAMILY, packages)
    assert load_custom([packages]) == []
    yield packages
    registry._entries["prior"].pop(NAME, None)
    forget_custom()


def load(folder: Path, **options: Any) -> Any:
    cls: Any = registry.lookup("prior", NAME).cls
    return cls(cls.Config(pretrained_model_name_or_path=str(folder), **options))


def reference(folder: Path) -> StableDiffusion3Pipeline:
    with torch.random.fork_rng(devices=[]):  # networks draw their first weights before they load those of the files
        return StableDiffusion3Pipeline.from_pretrained(folder)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_family_is_short() -> None:
    lines = FAMILY.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= 120


def test_conditionings_and_predictions_are_the_pipelines(custom: Path, folder: Path) -> None:
    prior, pipeline = load(folder), reference(folder)
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
    conditioning = prior.embed(PROMPTS)
    torch.testing.assert_close(conditioning.text, text)
    torch.testing.assert_close(conditioning.pooled, pooled)
    x_t, t = normal(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    shifted = 3.0 * t / (1.0 + 2.0 * t)
    with torch.no_grad():
        velocity = pipeline.transformer(x_t, text, pooled, 1000.0 * shifted).sample
        inputs = (x_t, conditioning.text, conditioning.pooled, 1000.0 * prior.schedule.sigma(t))
        same = prior.denoiser.network(*inputs).sample
        prediction = prior.predict(x_t, t, conditioning)
    assert isinstance(prior.schedule, FlowSchedule) and prediction.kind == "v_prediction"
    assert torch.equal(prediction.output, same)
    # Weights at other addresses in memory may be rounded in another order.
    torch.testing.assert_close(prediction.output, velocity)
    torch.testing.assert_close(prediction.x0, x_t - shifted.reshape(-1, 1, 1, 1) * velocity)


def test_images_and_latents_are_the_autoencoders(custom: Path, folder: Path) -> None:
    prior, vae = load(folder), reference(folder).vae
    assert (prior.image_size, prior.latent_shape(16, 32)) == (16, (4, 8, 16))
    rgb = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        latents = (vae.encode(2.0 * rgb.movedim(-1, 1) - 1.0).latent_dist.mode() - 0.06) * 1.5
        torch.testing.assert_close(prior.encode(rgb), latents)
        decoded = 0.5 * vae.decode(latents / 1.5 + 0.06).sample + 0.5
        torch.testing.assert_close(prior.decode(latents), decoded.movedim(1, -1))
    # Sides become multiples of the transformer's patches: 16 / 24 of the 38 pixels are 25.3, and a patch has 4.
    assert prior.encode(rgb.new_zeros(1, 24, 38, 3)).shape == (1, 4, 8, 12)


def test_it_samples_and_works_without_t5(custom: Path, folder: Path, tmp_path: Path) -> None:
    small = shutil.copytree(folder, tmp_path / "small")
    index = json.loads((small / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (small / "model_index.json").write_text(json.dumps(index))
    prior = load(small)
    conditioning = prior.embed(PROMPTS)
    assert conditioning.text.shape == (2, 24 + 256, TEXT_WIDTH) and not conditioning.text[:, 24:].any()
    conditions = CFGConditions(conditioning, prior.embed([""]))
    latents = sample(prior, conditions, steps=2, generator=torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()


def test_what_is_missing_or_does_not_fit_is_named(custom: Path, folder: Path, tmp_path: Path) -> None:
    prior = load(folder)
    with pytest.raises(PriorError, match=r"prior\.pretrained_model_name_or_path: .* no transformer in its model_index"):
        load(Path("embedded"))
    other = shutil.copytree(folder, tmp_path / "other")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(other / "scheduler")
    assert prior.sibling(str(folder), key="guidance.phi.model").channels == 4
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: the noise schedule of .* is not the prior's"):
        prior.sibling(str(other), key="guidance.phi.model")


@pytest.mark.parametrize("method", ["sds", "vsd", "rfds"])
def test_methods_distil_with_it(
    method: str, custom: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [
        "prompt=a red mug",
        f"prior.type={NAME}",
        f"prior.pretrained_model_name_or_path={folder}",
        "trainer.max_steps=3",
        "system.geometry.particles=2",
        "system.view=null",
        f"output_root={tmp_path}",
    ]
    recipe = ["--config", f"configs/text-to-2d/{method}.yaml", "--custom", str(custom), "--gpu", "cpu"]
    assert cli.main([*recipe, "--train", *overrides]) == cli.OK
    (last,) = tmp_path.rglob("last.ckpt")
    state = torch.load(last, map_location="cpu", weights_only=True)
    assert state["global_step"] == 3
    adapters = {name: value for name, value in state["state_dict"].items() if ".phi.up." in name}
    # Adapters start at zero, and each attends to the image and the text.
    assert bool(adapters) == (method == "vsd") and all(value.isfinite().all() for value in adapters.values())
    assert method != "vsd" or any(value.any() for value in adapters.values())
