"""LoRA of priors: predictions and text embeddings are those of the pipeline into which diffusers fused the file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from safetensors.torch import load_file, save_file
from shared.aura_flow_folder import build_aura_flow
from shared.family_checks import PROMPTS, load, normal, train
from shared.flow_folder import build_flow
from shared.flux_2_folder import build_flux_2
from shared.flux_folder import build_flux
from shared.lora_files import factors, fused, in_attention, write_diffusers, write_kohya
from shared.pixart_folder import build_pixart
from shared.qwen_image_folder import build_qwen_image
from shared.sana_folder import build_sana
from shared.sdxl_folder import build_sdxl
from shared.stable_diffusion_folder import build_folder
from shared.toy_parts import seeded
from shared.z_image_folder import build_z_image

from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior

SIZE = 16
CLIP = ("text_encoder", "text_encoder_2")


def build_sd(folder: Path) -> Path:
    return build_folder(folder, camera=False, vae="kl")


slow = pytest.mark.slow
FAMILIES: dict[str, tuple[Callable[[Path], Path], Any, tuple[str, ...]]] = {
    "stable-diffusion": (build_sd, StableDiffusionPipeline, ("unet", "text_encoder")),
    "stable-diffusion-xl": (build_sdxl, StableDiffusionXLPipeline, ("unet", *CLIP)),
    "stable-diffusion-3": (build_flow, StableDiffusion3Pipeline, ("transformer", *CLIP)),
    "flux": (build_flux, FluxPipeline, ("transformer", "text_encoder")),
    "flux-2": (partial(build_flux_2, klein=True), Flux2KleinPipeline, ("transformer",)),
    "qwen-image": (build_qwen_image, QwenImagePipeline, ("transformer",)),
    "sana": (build_sana, SanaPipeline, ("transformer",)),
    "aura-flow": (build_aura_flow, AuraFlowPipeline, ("transformer",)),
    "z-image": (build_z_image, ZImagePipeline, ("transformer",)),
}
QUICK = ("stable-diffusion-xl", "flux")
CASES = [pytest.param(name, marks=() if name in QUICK else slow) for name in FAMILIES]


def network_of(prior: DiffusersPrior, part: str) -> Any:
    """The network of a part of the prior."""
    if not part.startswith("text_encoder"):
        return prior.denoiser.network
    encoder: Any = prior.text
    return (getattr(encoder, "clip_2" if part.endswith("_2") else "clip", encoder)).network


def answers(prior: DiffusersPrior) -> tuple[Any, ...]:
    """A prediction, the text embedding and the pooled one."""
    text = prior.embed(PROMPTS)
    x = normal(2, *prior.latent_shape(prior.image_size, prior.image_size))
    with torch.no_grad():
        return prior.predict(x, torch.tensor([0.3, 0.8]), text).output, text.text, text.pooled


def with_networks(prior: DiffusersPrior, pipeline: Any, parts: tuple[str, ...]) -> tuple[Any, ...]:
    """The answers of a prior that computes with the networks of a pipeline."""
    for part in parts:
        network_of(prior, part).load_state_dict(getattr(pipeline, part).state_dict())
    return answers(prior)


def reference(cls: Any, folder: Path, *files: tuple[Path, float]) -> Any:
    """The pipeline into which diffusers fused the files, with peft's layers removed."""
    with seeded():
        absent = {"text_encoder_3": None, "tokenizer_3": None} if cls is StableDiffusion3Pipeline else {}
        pipeline = cls.from_pretrained(folder, **absent)
        for file, weight in files:
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
            parts = [part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None) is not None]
            pipeline.fuse_lora(components=parts, lora_scale=weight)
            pipeline.unload_lora_weights()
    return pipeline


@pytest.mark.parametrize("name", CASES)
def test_the_fused_pipeline_answers_alike(name: str, tmp_path: Path) -> None:
    build, cls, parts = FAMILIES[name]
    folder = build(tmp_path / "model")
    plain = load(folder, image_size=SIZE)
    layers = {part: factors(network_of(plain, part), in_attention) for part in parts}
    file = write_diffusers(tmp_path / "lora.safetensors", layers)
    prior = load(folder, image_size=SIZE, lora=[{"path": str(file), "weight": 0.7}])
    expected = with_networks(load(folder, image_size=SIZE), reference(cls, folder, (file, 0.7)), parts)
    torch.testing.assert_close(answers(prior), expected, rtol=1e-4, atol=1e-5)
    changed = [
        found is not None and bool((found - before).abs().mean() > 1e-3)
        for found, before in zip(answers(prior), answers(plain), strict=True)
    ]
    assert changed[0] and any(changed[1:]) == (len(parts) > 1)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def layers(sdxl: Path) -> dict[str, Any]:
    """Changes of convolutions and linear layers of all networks of the model."""
    plain = load(sdxl)

    def wanted(name: str) -> bool:
        return in_attention(name) or name.endswith(("conv1", "proj_in", "ff.net.2", "fc1"))

    return {part: factors(network_of(plain, part), wanted, seed=1) for part in ("unet", *CLIP)}


def by_hand(folder: Path, layers: dict[str, Any], scale: Any) -> tuple[Any, ...]:
    """The answers of the prior with the changes, computed by hand."""
    prior = load(folder)
    for part, changes in layers.items():
        fused(network_of(prior, part), changes, scale)
    return answers(prior)


def test_several_have_their_own_weights(sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    first = write_diffusers(tmp_path / "first.safetensors", {"unet": layers["unet"]})
    second = write_diffusers(tmp_path / "second.safetensors", {part: layers[part] for part in CLIP})
    prior = load(sdxl, lora=[str(first), {"path": str(second), "weight": -0.5}])
    pipeline = reference(StableDiffusionXLPipeline, sdxl, (first, 1.0), (second, -0.5))
    expected = with_networks(load(sdxl), pipeline, ("unet", *CLIP))
    torch.testing.assert_close(answers(prior), expected, rtol=1e-4, atol=1e-5)


def test_alpha_of_kohya_files_is_that_of_each_layer(sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    names = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    attention = {part: {k: v for k, v in layers[part].items() if in_attention(k)} for part in names}
    old = {part: dict(found) for part, found in attention.items()}
    for part in CLIP:  # kohya's names have the level that transformers has removed
        prefix = "" if any(name.startswith("text_model.") for name in old[part]) else "text_model."
        old[part] = {prefix + name: value for name, value in old[part].items()}
    file = write_kohya(tmp_path / "kohya.safetensors", {names[part]: old[part] for part in names}, [1.0, 3.0])
    expected = by_hand(sdxl, attention, [0.5, 1.5])
    torch.testing.assert_close(answers(load(sdxl, lora=str(file))), expected, rtol=1e-4, atol=1e-5)
    same = write_kohya(tmp_path / "same.safetensors", {names[part]: old[part] for part in names}, [3.0])
    pipeline = reference(StableDiffusionXLPipeline, sdxl, (same, 1.0))
    expected = with_networks(load(sdxl), pipeline, ("unet", *CLIP))
    torch.testing.assert_close(answers(load(sdxl, lora=str(same))), expected, rtol=1e-4, atol=1e-5)


def test_alpha_in_the_header_counts(sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    """The header of files that diffusers wrote; patterns are ends of names, in which dots may be escaped."""
    header = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {r"attn1\.to_q": 1}, "unet.use_rslora": False}
    attention = {name: value for name, value in layers["unet"].items() if in_attention(name)}
    header["unet.target_modules"] = ["to_q", "to_k", "to_v", "to_out.0"]
    file = write_diffusers(tmp_path / "lora.safetensors", {"unet": attention}, header)
    scales = [0.5 if name.endswith("attn1.to_q") else 3.0 for name in attention]
    expected = by_hand(sdxl, {"unet": attention}, scales)
    torch.testing.assert_close(answers(load(sdxl, lora=str(file))), expected, rtol=1e-4, atol=1e-5)
    pipeline = reference(StableDiffusionXLPipeline, sdxl, (file, 1.0))
    torch.testing.assert_close(with_networks(load(sdxl), pipeline, ("unet",)), expected, rtol=1e-4, atol=1e-5)


def test_regular_expressions_in_the_header_are_refused(sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    """Matching this one with the name of a layer would take years."""
    header = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {r"([a-z_.0-9]+)+!": 1}}
    attention = {name: value for name, value in layers["unet"].items() if in_attention(name)}
    file = write_diffusers(tmp_path / "lora.safetensors", {"unet": attention}, header)
    with pytest.raises(PriorError, match="has the pattern"):
        load(sdxl, lora=str(file))


def test_convolutions_and_folders(sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    write_diffusers(tmp_path / "any.safetensors", {"unet": layers["unet"]})
    expected = by_hand(sdxl, {"unet": layers["unet"]}, 1.0)
    torch.testing.assert_close(answers(load(sdxl, lora=str(tmp_path))), expected, rtol=1e-4, atol=1e-5)
    write_diffusers(tmp_path / "other.safetensors", {"unet": layers["unet"]})
    with pytest.raises(PriorError, match=r"^prior\.lora: .* has no file pytorch_lora_weights\.safetensors, but any"):
        load(sdxl, lora=str(tmp_path))
    prior = load(sdxl, lora=[{"path": str(tmp_path), "file": "other.safetensors"}])
    torch.testing.assert_close(answers(prior), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sds", "vsd"])
def test_methods_distil_from_it(method: str, sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    """The adapters of VSD are attached to the changed layers."""
    file = write_diffusers(tmp_path / "lora.safetensors", layers)
    train(load(sdxl, lora=str(file)), method)


def test_half_precision(sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    file = write_diffusers(tmp_path / "lora.safetensors", {"unet": layers["unet"]})
    half, full = load(sdxl, lora=str(file), precision="fp16"), load(sdxl, lora=str(file))
    weight, exact = (prior.denoiser.network.conv_in.weight for prior in (half, full))
    assert weight.dtype == torch.float16
    torch.testing.assert_close(weight.float(), exact, rtol=2e-3, atol=2e-3)


def test_what_does_not_fit_is_named(sdxl: Path, layers: dict[str, Any], tmp_path: Path) -> None:
    good = write_diffusers(tmp_path / "good.safetensors", {"unet": layers["unet"]})
    tensors = load_file(good)
    first = next(name for name in tensors if name.endswith("to_q.lora_B.weight"))
    layer = first.removeprefix("unet.").removesuffix(".lora_B.weight")

    def refused(message: str, changed: dict[str, Any], name: str = "bad.safetensors") -> None:
        save_file(changed, tmp_path / name)
        with pytest.raises(PriorError, match=rf"^prior\.lora: .*{message}") as error:
            load(sdxl, lora=str(tmp_path / name))
        assert len(str(error.value)) < 500

    size = len(tensors[first])
    refused(
        rf"change of {layer} is of shape \({size + 1}, .* use a LoRA of the same",
        tensors | {first: normal(size + 1, 2)},
    )
    refused(f"change of {layer} is incomplete", {name: value for name, value in tensors.items() if name != first})
    strange = {
        "unet.down_blocks.7.to_q.lora_A.weight": normal(2, 8),
        "unet.down_blocks.7.to_q.lora_B.weight": normal(8, 2),
    }
    refused(r"it changes down_blocks\.7\.to_q, which the unet of the model does not have", tensors | strange)
    refused(r"has the unknown key base\.layer", {"base.layer.lora_A.weight": normal(2, 8)})
    refused(r"has the unknown key unet\.scale", tensors | {"unet.scale": normal(2)})
    kohya = {"lora_unet_x.lora_down.weight": normal(2, 8), "lora_unet_x.lora_up.weight": normal(8, 2)}
    refused(r"is not a LoRA for .* lora_unet_x\.diff; use one of", kohya | {"lora_unet_x.diff": normal(2)})
    refused("is a LoHa, which is not supported", {"lora_unet_x.hada_w1_a": normal(2, 8)})
    refused("is a DoRA, which is not supported", tensors | {"unet.x.lora_magnitude_vector": normal(2)})
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    for name, message in {
        "cut.safetensors": "is not a complete safetensors file: ",
        "none.safetensors": "is neither an existing file or folder nor a hub id",
        "text.ckpt": r"is not a \.safetensors file; convert it",
    }.items():
        (tmp_path / "text.ckpt").write_text("")
        with pytest.raises(PriorError, match=rf"^prior\.lora: .*{message}"):
            load(sdxl, lora=str(tmp_path / name))
    with pytest.raises(PriorError, match=r"^prior\.lora: .*owner/style.* is not complete in the cache"):
        load(sdxl, lora="owner/style")


def test_a_family_without_a_reader_is_named(tmp_path: Path, layers: dict[str, Any]) -> None:
    file = write_diffusers(tmp_path / "lora.safetensors", {"transformer": layers["unet"]})
    with pytest.raises(PriorError, match=r"^prior\.lora: diffusers reads no LoRA for the pipeline of .*; remove"):
        load(build_pixart(tmp_path / "model"), lora=str(file))
