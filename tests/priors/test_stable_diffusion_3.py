"""The family of Stable Diffusion 3: the prior equals the pipeline of diffusers, and methods distil from it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from shared.family_checks import PROMPTS, check_predictions, conditions_of, guided_steps, load, normal
from shared.family_suite import FamilyCase, FamilySuite
from shared.flow_folder import CHANNELS, FACTOR, SIDE, SIZES, build_flow

from scoredist3d import cli
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.diffusion.schedule import FlowSchedule
from scoredist3d.priors import CFGConditions, camera_embedding, model_files, sample
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural.tokenizer import MAX_LENGTH
from scoredist3d.training.fit import import_lightning

import_lightning()  # before the tests: the import draws from a global random stream
NEGATIVE = "a green sphere"
SHIFT = SIZES.shift
WITHOUT_T5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
"""diffusers requires these arguments for a folder without T5."""


FAMILY = FamilyCase(
    build_flow,
    StableDiffusion3Pipeline,
    "JointTransformer",
    default_size=64,
    latents=(CHANNELS, 2, 1),
    limit=MAX_LENGTH,
    refused=(
        (
            {"transformer": ["diffusers", "ChromaTransformer2DModel"]},
            r"has no unet; its denoiser is its transformer, a Chroma.* 3\.x",
        ),
    ),
    pipeline_options=WITHOUT_T5,
)


class TestFamily(FamilySuite):
    """The tests of every family."""


def with_index(folder: Path, target: Path, **entries: Any) -> Path:
    """A copy of a folder with other entries in its index; None removes an entry."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text()) | entries
    index = {key: value for key, value in index.items() if value is not None}
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def cameras(count: int) -> Cameras:
    azimuth = torch.linspace(-150.0, 150.0, count)
    return orbit(azimuth, torch.full((count,), 15.0), torch.full((count,), 3.2), torch.full((count,), 40.0), 64, 64)


def test_the_folder_states_shift_cameras_and_vocabulary(folder: Path) -> None:
    prior = load(folder)
    assert prior.latent_shape(64, 32) == (CHANNELS, 8, 4)
    assert isinstance(prior.schedule, FlowSchedule) and prior.schedule.shift == SHIFT
    assert prior.takes_cameras and prior.unknown_words("a red zeppelin") == ["zeppelin"]


def test_diffusers_loads_the_folder_without_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("diffusers")
    library.addHandler(caplog.handler)
    try:
        with torch.random.fork_rng(devices=[]):
            StableDiffusion3Pipeline.from_pretrained(folder, **WITHOUT_T5)
    finally:
        library.removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("length", [0, 77, None])
def test_text_embeddings_are_the_pipelines(
    length: int | None, folder: Path, pipeline: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    prior = load(with_index(folder, tmp_path / "copy", _max_sequence_length=length))
    tokens = {} if length is None else {"max_sequence_length": length}
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, **tokens
        )
    conditioning = prior.embed(PROMPTS)
    assert conditioning.text.shape[1] == MAX_LENGTH + (256 if length is None else length)
    torch.testing.assert_close(conditioning.text, text)
    torch.testing.assert_close(conditioning.pooled, pooled)
    assert conditioning.camera is not None and not conditioning.camera.any()


def test_predictions_are_the_transformers(folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    prior, views = load(folder), cameras(2)
    conditioning = prior.embed(PROMPTS, views)
    x_t, t = normal(2, CHANNELS, SIDE, SIDE), torch.tensor([0.3, 0.8])
    shifted = SHIFT * t / (1.0 + (SHIFT - 1.0) * t)
    token = torch.zeros(2, 1, conditioning.text.shape[-1])
    token[:, 0, :16] = camera_embedding(views)
    with torch.no_grad():
        context = torch.cat([conditioning.text, token], dim=1)
        velocity = pipeline.transformer(x_t, context, conditioning.pooled, 1000.0 * shifted).sample
        prediction = prior.predict(x_t, t, conditioning)
        without = prior.predict(x_t, t, conditioning.without_camera())
    assert prediction.kind == "v_prediction"
    torch.testing.assert_close(prediction.output, velocity)
    torch.testing.assert_close(prediction.x0, x_t - shifted.reshape(-1, 1, 1, 1) * velocity)
    assert (without.output - velocity).abs().mean() > 0.01


def test_sides_become_multiples_of_the_patches(prior: DiffusersPrior) -> None:
    """The transformer's patches have 16 pixels each."""
    assert prior.encode(torch.zeros(1, 96, 152, 3)).shape == (1, CHANNELS, 8, 12)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_four_euler_steps_are_the_pipelines(scale: float, folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    prior = load(folder)
    conditions = CFGConditions(prior.embed(PROMPTS), prior.embed([NEGATIVE]))
    latents = sample(prior, conditions, steps=4, scale=scale, generator=torch.Generator().manual_seed(3))
    # One T5 token, which is zero, corresponds to the camera token of no camera.
    expected = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        height=FACTOR * SIDE,
        width=FACTOR * SIDE,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=scale,
        latents=normal(2, CHANNELS, SIDE, SIDE, seed=3),
        max_sequence_length=1,
        output_type="latent",
    ).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert (latents - normal(2, CHANNELS, SIDE, SIDE, seed=3)).abs().mean() > 0.1


def test_the_pipelines_default_call_samples_images(pipeline: StableDiffusion3Pipeline) -> None:
    images = pipeline(
        PROMPTS, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()


def test_a_model_without_camera_token_takes_no_cameras(folder: Path, tmp_path: Path) -> None:
    prior = load(with_index(folder, tmp_path / "plain", _camera_token=None))
    conditioning = prior.embed(PROMPTS, cameras(2))
    assert not prior.takes_cameras and conditioning.camera is None
    inputs = prior.denoiser.inputs(conditioning)
    assert inputs["encoder_hidden_states"] is conditioning.text


def test_what_is_missing_or_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    prior = load(folder)
    with pytest.raises(ValueError, match="is conditioned on cameras; make the conditioning with"):
        prior.denoiser.inputs(load(with_index(folder, tmp_path / "plain", _camera_token=None)).embed(PROMPTS))
    other = with_index(folder, tmp_path / "other")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(other / "scheduler")
    with pytest.raises(PriorError, match=r"guidance\.phi\.model: the noise schedule of .* is not the prior's"):
        prior.sibling(str(other), key="guidance.phi.model")


def test_the_packaged_model_is_named_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = {"embedded-flow": (tmp_path / "none", "scripts/train_flow_prior.py")}
    monkeypatch.setattr(model_files, "PACKAGED", packaged)
    with pytest.raises(PriorError, match=r"'embedded-flow' is missing from .*none; .* scripts/train_flow_prior\.py"):
        load(Path("embedded-flow"))


def test_predictions_at_the_pipelines_own_steps(folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    prior = load(folder)
    # One T5 token, which is zero, corresponds to the camera token of no camera.
    options = {"negative_prompt": [NEGATIVE] * 2, "guidance_scale": 5.0, "max_sequence_length": 1}
    check_predictions(prior, conditions_of(prior, NEGATIVE), 5.0, guided_steps(pipeline, prior, **options))


RECIPES = {
    "text-to-2d": ["system.geometry.particles=2"],
    "text-to-3d": [
        "system.geometry.grid={num_levels: 2, log2_hashmap_size: 6}",
        "system.renderer.num_samples=8",
        "data={height: 16, width: 16, batch_size: 2, resolution_milestones: []}",
        "test={frames: 1, height: 8, width: 8}",
        "exporter={type: textured-mesh, resolution: 16, texture_size: 32, max_faces: 100, check: false}",
        "checkpoint.every_n_steps=0",
        "preview.every_n_steps=0",
    ],
}


@pytest.mark.parametrize("task", sorted(RECIPES))
@pytest.mark.parametrize("method", ["sds", "sdi", "rfds", "fsd", "vsd", "vsd with another model"])
def test_methods_distil_from_it(
    task: str, method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of each recipe with the configuration of the packaged flow prior; phi may be another model."""
    monkeypatch.setattr(model_files, "PACKAGED", {"embedded-flow": (folder, "")})
    method, _, sibling = method.partition(" ")
    configs = [f"configs/{task}/{method}.yaml", "configs/prior/embedded-flow.yaml"]
    overrides = ["prompt=a red mug", "trainer.max_steps=2", f"output_root={tmp_path}", *RECIPES[task]]
    overrides += [f"system.guidance.phi.model={folder}"] if sibling else []
    assert cli.main(["--config", *configs, "--gpu", "cpu", "--train", *overrides]) == cli.OK
    (last,) = tmp_path.rglob("last.ckpt")
    state = torch.load(last, map_location="cpu", weights_only=True)
    assert state["global_step"] == 2
    weights = [value for value in state["state_dict"].values() if isinstance(value, torch.Tensor)]
    assert weights and all(value.isfinite().all() for value in weights)
    # The adapters of phi start at zero.
    adapters = [value for name, value in state["state_dict"].items() if ".phi.up." in name]
    assert bool(adapters) == (method == "vsd") and (method != "vsd" or any(value.any() for value in adapters))
