"""The UNet family: loading, encoding, text conditioning and prediction, with tiny random models."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from scoredist3d import registry
from scoredist3d.cameras import orbit
from scoredist3d.priors import CFGConditions, Conditioning, camera_embedding, guided_prediction, sample
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.vocabulary import Nouns


def load(folder, **options) -> DiffusersPrior:
    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(folder), **options))


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def cameras(count: int):
    azimuth = torch.linspace(-150.0, 150.0, count)
    return orbit(azimuth, torch.full((count,), 15.0), torch.full((count,), 2.5), torch.full((count,), 40.0), 16, 16)


def test_is_registered_with_the_embedded_default():
    entry = registry.lookup("prior", "diffusers")
    assert entry.cls is DiffusersPrior and entry.config_cls().pretrained_model_name_or_path == "embedded"


def test_loads_frozen_and_in_evaluation_mode(folders):
    prior = load(folders())
    assert not any(p.requires_grad for p in prior.parameters()) and not any(m.training for m in prior.modules())
    assert (prior.image_size, prior.latent_shape(16, 16), prior.latent_shape(32, 16)) == (16, (4, 8, 8), (4, 16, 8))
    assert prior.takes_cameras and prior.schedule.prediction_type == "v_prediction"
    assert prior.dtype == torch.float32


def test_prediction_is_the_networks_output(folders):
    prior = load(folders())
    unet = UNet2DConditionModel.from_pretrained(folders() / "unet")
    views = cameras(2)
    conditioning = prior.embed(["a red mug", "a chair"], views)
    x, t = normal(2, 4, 8, 8), torch.tensor([0.5, 0.123])
    with torch.no_grad():
        expected = unet(
            x, torch.tensor([500, 123]), encoder_hidden_states=conditioning.text, class_labels=camera_embedding(views)
        ).sample
    prediction = prior.predict(x, t, conditioning)
    torch.testing.assert_close(prediction.output, expected, rtol=0, atol=1e-5)
    assert prediction.kind == "v_prediction" and torch.equal(prediction.v, prediction.output)
    alpha, sigma = (c[:, None, None, None] for c in prior.schedule.coefficients(t))
    torch.testing.assert_close(prediction.eps, alpha * expected + sigma * x)
    torch.testing.assert_close(prediction.x0, alpha * x - sigma * expected)


def test_camera_and_text_matter_and_no_camera_is_zeros(folders):
    prior = load(folders())
    x, t = normal(2, 4, 8, 8), torch.tensor([0.5, 0.5])
    seen = prior.embed(["a red mug"] * 2, cameras(2))
    blind = prior.embed(["a red mug"] * 2)
    assert torch.equal(blind.camera, torch.zeros(2, 16)) and torch.equal(blind.camera, seen.without_camera().camera)
    assert not torch.allclose(prior.predict(x, t, seen).output, prior.predict(x, t, blind).output)
    other = prior.embed(["a blue chair"] * 2)
    assert not torch.allclose(prior.predict(x, t, other).output, prior.predict(x, t, blind).output)
    with pytest.raises(ValueError, match="conditioned on cameras"):
        prior.predict(x, t, Conditioning(seen.text))
    with pytest.raises(ValueError, match="the same number of cameras"):
        prior.embed(["a mug"], cameras(2))


def test_without_camera_embedding(folders):
    prior = load(folders(camera=False))
    assert not prior.takes_cameras
    conditioning = prior.embed(["a mug"], cameras(1))
    assert conditioning.camera is None and conditioning.text.shape == (1, 8, 16)
    assert prior.predict(torch.zeros(1, 4, 8, 8), torch.tensor([0.5]), conditioning).output.shape == (1, 4, 8, 8)


def test_encode_and_decode_follow_the_autoencoder(folders):
    prior = load(folders())
    vae = AutoencoderKL.from_pretrained(folders() / "vae")
    rgb = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        posterior = vae.encode(2 * rgb.permute(0, 3, 1, 2) - 1).latent_dist
        mode = prior.encode(rgb)
        torch.testing.assert_close(mode, posterior.mean * 0.5)
        drawn = prior.encode(rgb, torch.Generator().manual_seed(3))
        noise = torch.randn(mode.shape, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise) * 0.5)
        expected = vae.decode(mode / 0.5).sample
        torch.testing.assert_close(prior.decode(mode), (0.5 * expected + 0.5).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("height", "width", "latent"), [(16, 16, (8, 8)), (40, 40, (8, 8)), (7, 7, (8, 8)), (16, 32, (8, 16))]
)
def test_images_are_resized_to_the_models_size_with_gradient(folders, height, width, latent):
    prior = load(folders())
    rgb = image(1, height, width, 3).requires_grad_()
    z = prior.encode(rgb)
    assert z.shape == (1, 4, *latent)
    (gradient,) = torch.autograd.grad(z.square().sum(), rgb)
    assert gradient.abs().sum() > 0 and torch.isfinite(gradient).all()
    assert all(p.grad is None for p in prior.parameters())


def test_pixel_model_without_autoencoder(folders):
    prior = load(folders(vae=None, camera=False))
    rgb = image(1, 8, 8, 3)
    assert prior.image_size == 8 and prior.latent_shape(8, 8) == (3, 8, 8)
    torch.testing.assert_close(prior.encode(rgb), 2 * rgb.permute(0, 3, 1, 2) - 1)
    torch.testing.assert_close(prior.decode(prior.encode(rgb)), rgb)


def test_variance_channels_are_dropped(folders):
    prior = load(folders(vae=None, camera=False, out_channels=6))
    x = torch.zeros(1, 3, 8, 8)
    assert prior.predict(x, torch.tensor([0.5]), prior.embed([""])).output.shape == x.shape


def test_tiny_autoencoder(folders):
    prior = load(folders(vae="tiny"))
    z = prior.encode(image(1, 16, 16, 3), torch.Generator())
    assert z.shape == (1, 4, 8, 8) and prior.decode(z).shape == (1, 16, 16, 3)


def test_half_precision_keeps_the_callers_dtype(folders):
    prior = load(folders(), precision="bf16")
    assert prior.dtype == torch.bfloat16
    x = normal(1, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = prior.predict(x, torch.tensor([0.5]), prior.embed(["a mug"]))
    assert prediction.output.dtype == torch.float32 and prediction.eps.dtype == torch.float32
    assert prior.encode(image(1, 16, 16, 3)).dtype == torch.float32
    assert prior.to("cpu").dtype == torch.bfloat16


@pytest.mark.gpu
def test_auto_precision_follows_the_device(folders):
    prior = load(folders())
    holder = torch.nn.ModuleList([prior]).to("cuda")
    assert prior.dtype == torch.float16 and prior.device.type == "cuda"
    z = sample(
        prior,
        CFGConditions(prior.embed(["a mug"]), prior.embed([""])),
        steps=2,
        generator=torch.Generator("cuda").manual_seed(0),
    )
    assert z.device.type == "cuda" and torch.isfinite(z).all()
    holder.to("cpu")
    assert prior.dtype == torch.float32


def test_unknown_words_are_found(folders):
    prior = load(folders())
    assert prior.unknown_words("a Red teapot, front view of 2 teapots") == ["teapot", "of", "teapots"]
    assert prior.unknown_words("a blue mug") == []


def test_sampling_is_seeded_and_guided(folders):
    prior = load(folders())
    conditions = CFGConditions(prior.embed(["a red mug"] * 2, cameras(2)), prior.embed([""] * 2, cameras(2)))
    draws = [sample(prior, conditions, steps=4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])
    assert draws[0].shape == (2, 4, 8, 8)
    other = sample(prior, conditions, steps=4, scale=1.0, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(draws[0], other)


def test_guidance_runs_one_forward_pass_over_the_needed_conditions(folders):
    prior = load(folders())
    sizes = []
    prior.denoiser.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    one = prior.embed(["a red mug"])
    other = prior.embed(["a chair"])
    conditions = CFGConditions(
        one, prior.embed([""]), negatives=((other, torch.tensor([-0.5])), (other, torch.tensor([-1.0])))
    )
    plain = CFGConditions(one, conditions.unconditional)
    x, t = normal(3, 4, 8, 8), torch.full((3,), 0.4)
    for scale, chosen, expected in [
        (7.5, plain, 6),
        (1.0, plain, 3),
        (0.0, plain, 3),
        (7.5, conditions, 12),
        (0.0, conditions, 3),
    ]:
        sizes.clear()
        guided_prediction(prior, x, t, chosen, scale)
        assert sizes == [expected]


def broken(folders, tmp_path):
    return shutil.copytree(folders(), tmp_path / "broken")


def test_missing_folder_is_named():
    with pytest.raises(PriorError, match=r"'/no/such/folder' is neither an existing folder"):
        load("/no/such/folder")


def test_unreachable_hub_id_is_named():
    with pytest.raises(PriorError, match=r"'nobody/nothing' is not an existing folder, and the model of this id"):
        load("nobody/nothing")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("model_index.json", "model_index.json is missing"),
        ("unet", "its folder unet/ is missing"),
        ("scheduler/scheduler_config.json", r"scheduler/scheduler_config.json is missing"),
        ("vae/diffusion_pytorch_model.safetensors", "the vae of .* cannot be loaded"),
        ("text_encoder/model.safetensors", "the text_encoder of .* cannot be loaded"),
    ],
)
def test_incomplete_folder_names_the_part(folders, tmp_path, remove, message):
    folder = broken(folders, tmp_path)
    path = folder / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(PriorError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("part", "file"), [("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")]
)
def test_missing_weights_are_an_error(folders, tmp_path, part, file):
    folder = broken(folders, tmp_path)
    weights = load_file(folder / part / file)
    dropped = sorted(weights)[0]
    del weights[dropped]
    save_file(weights, folder / part / file, metadata={"format": "pt"})
    with pytest.raises(PriorError, match=f"the {part} of .* lacks 1 weights; the first is "):
        load(folder)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"projection_class_embeddings_input_dim": 7}, "with 7 inputs; a camera embedding has 16"),
        ("scheduler", {"prediction_type": "noise"}, "prediction_type must be one of"),
    ],
)
def test_unfit_parts_are_named(folders, tmp_path, part, change, message):
    folder = broken(folders, tmp_path)
    path = next((folder / part).glob("*config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_unknown_classes_are_named(folders, tmp_path):
    folder = broken(folders, tmp_path)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for value, message in [
        (["diffusers", "NoSuchNet"], "NoSuchNet, which the installed diffusers does not have"),
        (["flax", "FlaxUNet"], "only classes of diffusers and transformers"),
        ([None, None], "has no unet"),
    ]:
        path.write_text(json.dumps({**index, "unet": value}))
        with pytest.raises(PriorError, match=message):
            load(folder)
    path.write_text("{")
    with pytest.raises(PriorError, match="not valid JSON"):
        load(folder)


def test_vocabulary_forms(folders, tmp_path):
    folder = broken(folders, tmp_path)
    (folder / "vocabulary.json").write_text(json.dumps({"words": ["ice cream", "Mug"]}))
    assert load(folder).vocabulary == {"ice", "cream", "mug"}
    (folder / "vocabulary.json").write_text(json.dumps({"list": []}))
    with pytest.raises(PriorError, match="must be a list of words"):
        load(folder)
    content = {"words": ["a"], "nouns": {"wine glass": ["goblet"]}, "generic_nouns": ["thing"]}
    (folder / "vocabulary.json").write_text(json.dumps(content))
    prior = load(folder)
    assert prior.vocabulary == {"a", "wine", "glass", "goblet", "thing"}
    assert prior.nouns == Nouns({"wine glass": ("goblet",)}, ("thing",)) and not prior.allow_unknown_nouns
    stated = DiffusersPrior.stated_vocabulary(prior.config)
    assert stated is not None and (stated.words, stated.nouns) == (prior.vocabulary, prior.nouns)
    content |= {"words": ["thin", "red"], "adjectives": [["thin"], ["red"]]}
    (folder / "vocabulary.json").write_text(json.dumps(content))
    prior = load(folder)
    assert prior.worded("a red thin goblet") == "a thin red goblet"
    embedded = [prior.embed([text]).text for text in ("a red thin goblet", "a thin red goblet")]
    torch.testing.assert_close(*embedded)
    for wrong in ("red", ["red"], [["red"], 1]):
        (folder / "vocabulary.json").write_text(json.dumps(content | {"adjectives": wrong}))
        with pytest.raises(PriorError, match="adjectives"):
            load(folder)
    (folder / "vocabulary.json").unlink()
    assert load(folder).vocabulary is None and load(folder).unknown_words("anything goes") == []
    assert DiffusersPrior.stated_vocabulary(prior.config) is None
    hub = DiffusersPrior.Config(pretrained_model_name_or_path="owner/model")
    assert DiffusersPrior.stated_vocabulary(hub) is None


def test_code_in_a_model_folder_never_runs(folders, tmp_path, monkeypatch):
    # Without an explicit refusal, transformers asks on the terminal whether the folder's code may run.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    folder = broken(folders, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "AutoModel"]}))
    part = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"}}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(part))
    (folder / "text_encoder" / "foreign.py").write_text("raise SystemExit('foreign code ran')\n")
    with pytest.raises(PriorError, match=r"a transformers\.AutoModel, which is not the class of a model"):
        load(folder)


def test_clip_sees_padding_unless_its_configuration_masks_it(folders, tmp_path):
    folder = broken(folders, tmp_path)
    plain = load(folder)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_attention_mask": True}))
    masked = load(folder)
    tokens = plain.text.tokenizer(["a mug"], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        for prior, mask in ((plain, None), (masked, tokens.attention_mask)):
            expected = prior.text.network(tokens.input_ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(prior.embed(["a mug"]).text, expected)
    assert not torch.allclose(masked.embed(["a mug"]).text, plain.embed(["a mug"]).text, atol=1e-3)
