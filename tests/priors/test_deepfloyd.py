"""DeepFloyd IF's first stage against diffusers' IFPipeline, on a tiny random model."""

import json
import logging
import shutil
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, IFPipeline
from shared.deepfloyd_folder import TEXT_WIDTH, build_deepfloyd
from shared.family_checks import check_predictions, load, recorded
from shared.family_suite import FamilyCase, FamilySuite

from scoredist3d.priors import CFGConditions, guided_prediction, sample
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.frozen_network import cast_network
from scoredist3d.priors.thresholding import SampleLimit

PROMPTS = ["  A red Mug", "blue chair with a very long caption " * 4]
STEPS = 5


def use_ddim(pipeline: IFPipeline) -> None:
    """Give the pipeline a DDIM sampler and the thresholding of its own scheduler."""
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.scheduler.register_to_config(variance_type="fixed_small")  # DDIM reads no learned variance


FAMILY = FamilyCase(
    partial(build_deepfloyd, thresholding=True),
    IFPipeline,
    "UNetDenoiser",
    default_size=16,
    latents=(3, 16, 8),
    limit=77,
    parts=("unet", "text_encoder"),
    refused=(
        ({"unet": ["diffusers", "Kandinsky3UNet"]}, r"is a Kandinsky3UNet, not a UNet2DConditionModel"),
        (
            {
                "_class_name": "ChromaPipeline",
                "unet": [None, None],
                "transformer": ["diffusers", "ChromaTransformer2DModel"],
            },
            r"\(ChromaPipeline\) has no unet; its denoiser is its transformer, a ChromaTransformer2DModel",
        ),
    ),
    prepare=use_ddim,
    other_sibling=f"attends to text embeddings of width .* computes {TEXT_WIDTH}-dimensional ones",
    encode=lambda vae, x: x,
    decode=lambda vae, latents: latents,
)
reference = FAMILY.reference


class TestFamily(FamilySuite):
    """The tests of every family."""


def conditions_of(prior: DiffusersPrior) -> CFGConditions:
    return CFGConditions(prior.embed(PROMPTS), prior.embed([""] * len(PROMPTS)))


def test_text_embeddings_are_the_pipelines(folder):
    prior, pipeline = load(folder), reference(folder)
    positive, unconditional = pipeline.encode_prompt(PROMPTS)
    conditions = conditions_of(prior)
    assert conditions.positive.text.shape == (2, 77, TEXT_WIDTH)
    torch.testing.assert_close(conditions.positive.text, positive)
    torch.testing.assert_close(conditions.unconditional.text, unconditional)


def test_truncation_of_a_long_prompt_is_reported(folder, caplog):
    prior = load(folder)
    with caplog.at_level(logging.WARNING):
        prior.embed(PROMPTS)
    assert len(caplog.records) == 1 and "longer than the prior's limit of 77 tokens" in caplog.text


def test_prediction_and_guidance_are_the_pipelines(folder):
    prior, pipeline = load(folder), reference(folder)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7, 0.7])
    positive, unconditional = pipeline.encode_prompt(PROMPTS)
    with torch.no_grad():
        output = pipeline.unet(torch.cat([x, x]), 700, torch.cat([unconditional, positive])).sample
    eps_u, eps_c = output[:, :3].chunk(2)
    conditions = conditions_of(prior)
    torch.testing.assert_close(prior.predict(x, t, conditions.positive).eps, eps_c)
    guided = guided_prediction(prior, x, t, conditions, 7.0)
    torch.testing.assert_close(guided.eps, eps_u + 7.0 * (eps_c - eps_u), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(eps_u, eps_c, atol=1e-3)


def test_predictions_at_the_pipelines_own_steps(folder):
    prior, pipeline = load(folder), reference(folder)
    steps = recorded(
        pipeline,
        prompt=PROMPTS,
        guidance_scale=7.0,
        num_inference_steps=4,
        clean_caption=False,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    )
    check_predictions(prior, conditions_of(prior), 7.0, steps)


@pytest.mark.parametrize("thresholding", [True, False])
def test_samples_are_the_pipelines(tmp_path, thresholding):
    folder = build_deepfloyd(tmp_path, thresholding=thresholding)
    prior, pipeline = load(folder), reference(folder)
    expected = pipeline(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=7.0,
        output_type="pt",
        clean_caption=False,
        generator=torch.Generator().manual_seed(3),
    ).images
    drawn = sample(
        prior, conditions_of(prior), steps=STEPS, scale=7.0, generator=torch.Generator().manual_seed(3), batch=2
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3)
    assert prior.image_size == 16 and prior.decode(drawn).shape == (2, 16, 16, 3)


def test_adapters_see_every_projection_and_the_text_encoders_width(folder):
    prior = load(folder)
    points = prior.adapter_points()
    assert points.text_width == prior.embed(["a"]).text.shape[-1]
    assert {path.rsplit(".", 1)[-1] for path in points.linears} >= {"to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"}


def test_half_precision_keeps_t5_output_layers_in_single_precision(folder):
    loaded, cast = load(folder, precision="fp16").text.network, load(folder).text.network
    cast_network(cast, torch.float16)
    for encoder in (loaded, cast):
        dtypes = {path.split(".")[-2]: p.dtype for path, p in encoder.named_parameters()}
        assert dtypes["wo"] == torch.float32 and dtypes["q"] == dtypes["wi_0"] == torch.float16
    expected = load(folder).embed(PROMPTS).text
    prior = load(folder)
    cast_network(prior.text.network, torch.float16)
    torch.testing.assert_close(prior.embed(PROMPTS).text, expected, rtol=0.05, atol=0.05)


def test_limits_of_the_scheduler():
    x = torch.tensor([[0.5, -3.0], [0.2, 0.4]]).reshape(2, 1, 1, 2)
    clip = SampleLimit.from_scheduler_config({"clip_sample": True, "clip_sample_range": 2.0})
    assert clip(x).flatten().tolist() == pytest.approx([0.5, -2.0, 0.2, 0.4])
    dynamic = SampleLimit.from_scheduler_config(
        {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.5}
    )
    assert dynamic(x).flatten().tolist() == pytest.approx([0.5 / 1.5, -1.0, 0.2, 0.4])
    assert SampleLimit.from_scheduler_config({"clip_sample": False}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"addition_embed_type": "text_time"},
            r"pooled text embeddings and image sizes \(Kolors, inpainting with Stable Diffusion XL, its refiner\)",
        ),
        ({"addition_embed_type": "text_image"}, r"image embeddings \(Kandinsky 2.1\)"),
        ({"addition_embed_type": "image"}, r"image embeddings \(Kandinsky 2.2\)"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, r"IP-Adapter"),
        ({"addition_embed_type": "sound"}, "addition_embed_type=sound"),
        ({"class_embed_type": "timestep"}, r"a low-resolution image and its timestep \(DeepFloyd IF for image editing"),
        ({"num_class_embeds": 1000}, "class labels .the Stable Diffusion x4 upscaler"),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
            "Stable unCLIP.*2048 inputs",
        ),
        ({"time_cond_proj_dim": 256}, r"the guidance scale \(latent consistency models\)"),
    ],
)
def test_unsupported_families_are_named(folder, tmp_path, change, message):
    broken = shutil.copytree(folder, tmp_path / "broken")
    path = broken / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PriorError, match=rf"^prior\.pretrained_model_name_or_path: .*IFPipeline.* needs .*{message}"):
        load(broken)
