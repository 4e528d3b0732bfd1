"""Models in one file: they answer as the diffusers folders from which the files were written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from shared.family_checks import KEY, PROMPTS, copy_with, images, load, normal, train
from shared.flow_folder import build_flow
from shared.flux_folder import build_flux
from shared.lora_files import factors, in_attention, write_diffusers
from shared.original_layouts import clip, flux, joint_transformer, ldm_unet, ldm_vae, open_clip, weights
from shared.sdxl_folder import build_sdxl
from shared.stable_diffusion_folder import build_folder

from scoredist3d.priors import single_file
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.flux_checkpoint import convert_flux
from scoredist3d.priors.part_files import build_network
from scoredist3d.priors.single_file import LAYOUTS, recognized

Tensors = dict[str, torch.Tensor]


def sd1(folder: Path) -> tuple[Path, Tensors]:
    folder = build_folder(folder, camera=False, vae="kl")
    text = clip(weights(folder, "text_encoder"), "cond_stage_model.transformer.")
    return folder, ldm_unet(weights(folder, "unet")) | ldm_vae(weights(folder, "vae"), 2) | text


def sd2(folder: Path) -> tuple[Path, Tensors]:
    folder = build_folder(folder, camera=False, vae="kl")
    text = open_clip(weights(folder, "text_encoder"), "cond_stage_model.model.")
    return folder, ldm_unet(weights(folder, "unet")) | ldm_vae(weights(folder, "vae"), 2) | text


def sdxl(folder: Path) -> tuple[Path, Tensors]:
    folder = build_sdxl(folder)
    text = clip(weights(folder, "text_encoder"), "conditioner.embedders.0.transformer.")
    text |= open_clip(weights(folder, "text_encoder_2"), "conditioner.embedders.1.model.")
    return folder, ldm_unet(weights(folder, "unet")) | ldm_vae(weights(folder, "vae"), 2) | text


def sd3(folder: Path) -> tuple[Path, Tensors]:
    """The pooled embedding of the first text encoder is not projected."""
    folder = build_flow(folder)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    first = weights(folder, "text_encoder")
    first["text_projection.weight"] = torch.eye(len(first["text_projection.weight"]))
    save_file(first, file, metadata={"format": "pt"})
    text = clip(first, "text_encoders.clip_l.transformer.")
    text |= clip(weights(folder, "text_encoder_2"), "text_encoders.clip_g.transformer.")
    return folder, joint_transformer(weights(folder, "transformer")) | ldm_vae(weights(folder, "vae"), 4) | text


def flux_of_authors(folder: Path) -> tuple[Path, Tensors]:
    folder = build_flux(folder)
    return folder, flux(weights(folder, "transformer"))


def flux_with_all_parts(folder: Path) -> tuple[Path, Tensors]:
    folder = build_flux(folder, distilled=False)
    t5 = {f"text_encoders.t5xxl.transformer.{k}": v for k, v in weights(folder, "text_encoder_2").items()}
    text = clip(weights(folder, "text_encoder"), "text_encoders.clip_l.transformer.") | t5
    vae = ldm_vae(weights(folder, "vae"), 2, "vae.")
    return folder, flux(weights(folder, "transformer"), "model.diffusion_model.") | vae | text


Build = Callable[[Path], tuple[Path, Tensors]]
MODELS: dict[str, tuple[Build, tuple[str, ...]]] = {
    "sd1": (sd1, ("unet", "vae", "text_encoder")),
    "sd2": (sd2, ("unet", "vae", "text_encoder")),
    "sdxl": (sdxl, ("unet", "vae", "text_encoder", "text_encoder_2")),
    "sd3": (sd3, ("transformer", "vae", "text_encoder", "text_encoder_2")),
    "flux of its authors": (flux_of_authors, ("transformer",)),
    "flux with all parts": (flux_with_all_parts, ("transformer", "vae", "text_encoder", "text_encoder_2")),
}


def written(tmp_path: Path, name: str) -> tuple[Path, Path, Path]:
    """The folder, the single file, and a copy of the folder without the weights that are in the file."""
    build, parts = MODELS[name]
    folder, tensors = build(tmp_path / "model")
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = shutil.copytree(folder, tmp_path / "config")
    for part in parts:
        for file in (config / part).glob("*.safetensors"):
            file.unlink()
    return folder, tmp_path / "model.safetensors", config


def answers(prior: Any) -> tuple[Any, ...]:
    """A prediction, the text embeddings, latents and images."""
    text, side = prior.embed(PROMPTS), prior.image_size
    x, rgb = normal(2, *prior.latent_shape(side, side)), images(side)
    with torch.no_grad():
        output = prior.predict(x, torch.tensor([0.3, 0.8]), text).output
        return output, text.text, text.pooled, prior.encode(rgb), prior.decode(x)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_answers_as_its_folder(name: str, tmp_path: Path) -> None:
    folder, file, config = written(tmp_path, name)
    prior, plain = load(file, config=str(config), image_size=16), load(folder, image_size=16)
    assert type(prior.denoiser) is type(plain.denoiser)
    torch.testing.assert_close(answers(prior), answers(plain), rtol=0, atol=0)
    t = torch.linspace(0.0, 1.0, 11)
    torch.testing.assert_close(prior.schedule.coefficients(t), plain.schedule.coefficients(t))
    half = load(file, config=str(config), image_size=16, precision="fp16")
    assert half.dtype == torch.float16 and half.distilled == plain.distilled
    train(prior, "vsd")


CLIP_L, CLIP_G, T5 = 123_060_480, 694_659_840, 4_762_310_656
SD, SDXL = {"vae": 83_653_863, "text_encoder": CLIP_L}, {"text_encoder_2": CLIP_G}
SD2 = {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}
SD3 = {"text_encoder": CLIP_L + 768 * 768, "text_encoder_2": CLIP_G, "text_encoder_3": T5, "vae": 83_819_683}
FLUX = {"text_encoder": CLIP_L, "text_encoder_2": T5, "vae": 83_819_683}
PARAMETERS = {
    "stable-diffusion-1": SD | {"unet": 859_520_964},
    "stable-diffusion-2": SD2,
    "stable-diffusion-2-base": SD2,
    "stable-diffusion-xl": SD | SDXL | {"unet": 2_567_463_684},
    "stable-diffusion-3-medium": SD3 | {"transformer": 2_028_328_000},
    "stable-diffusion-3.5-medium": SD3 | {"transformer": 2_243_171_520},
    "stable-diffusion-3.5-large": SD3 | {"transformer": 8_056_627_520},
    "flux-dev": FLUX | {"transformer": 11_901_408_320},
    "flux-schnell": FLUX | {"transformer": 11_891_178_560},
}
"""Numbers of parameters of the published networks, from memory: no weights were reachable."""


def without_memory(layout: str) -> dict[str, Any]:
    """The networks of a packaged layout in full size, on the meta device."""
    source = PipelineSource.open(str(LAYOUTS / layout))
    with torch.device("meta"):
        return {part: build_network(source._class_of(part), source.network_config(part)) for part in PARAMETERS[layout]}


def config_of(network: Any) -> dict[str, Any]:
    """The configuration of a network of diffusers or transformers."""
    return network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)


@pytest.mark.parametrize("layout", PARAMETERS)
def test_packaged_layouts_have_the_published_sizes_and_names(layout: str) -> None:
    networks = without_memory(layout)
    counts = {part: sum(each.numel() for each in network.parameters()) for part, network in networks.items()}
    assert counts == PARAMETERS[layout]
    states = {part: network.state_dict() for part, network in networks.items()}
    tensors: Tensors = {}
    if "unet" in states:
        xl, one = "text_encoder_2" in states, layout.startswith("stable-diffusion-1")
        tensors |= ldm_unet(states["unet"], 2) | ldm_vae(states["vae"], 4)
        first = clip if xl or one else open_clip
        prefix = "conditioner.embedders.0." if xl else "cond_stage_model."
        tensors |= first(states["text_encoder"], prefix + ("transformer." if first is clip else "model."))
        tensors |= open_clip(states["text_encoder_2"], "conditioner.embedders.1.model.") if xl else {}
    elif layout.startswith("stable-diffusion-3"):
        tensors |= joint_transformer(states["transformer"]) | ldm_vae(states["vae"], 4)
        tensors |= clip(states["text_encoder"], "text_encoders.clip_l.transformer.")
        tensors |= clip(states["text_encoder_2"], "text_encoders.clip_g.transformer.")
    else:
        return  # test_names_of_flux_are_those_of_diffusers
    found = recognized(tensors)
    assert found is not None and found[0] == layout.removesuffix("-base")
    for part, (prefix, convert) in found[1].items():
        given = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if given:
            converted = convert(given, config_of(networks[part]), networks[part])
            shapes = {name: tensor.shape for name, tensor in converted.items() if "position_ids" not in name}
            assert shapes == {name: tensor.shape for name, tensor in states[part].items()}


def test_names_of_flux_are_those_of_diffusers() -> None:
    """At full width, without memory: diffusers' converter accepts no other width."""
    config = json.loads((LAYOUTS / "flux-dev" / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config({**config, "num_layers": 1, "num_single_layers": 1})
        tensors = flux(network.state_dict())
        ours, theirs = convert_flux(tensors, 3072), convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.items()} == shapes
    assert {name: tensor.shape for name, tensor in theirs.items()} == shapes


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return written(tmp_path_factory.mktemp("single"), "sdxl")


def test_additions_apply_to_files(single: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """LoRA, textual inversion and another autoencoder, as for the folder."""
    folder, file, config = single
    layers = factors(load(folder).denoiser.network, in_attention)
    lora = write_diffusers(tmp_path / "lora.safetensors", {"unet": layers})
    save_file({"clip_l": normal(2, 8), "clip_g": normal(2, 16)}, tmp_path / "mug.safetensors")
    added = {"lora": str(lora), "textual_inversion": [{"path": str(tmp_path / "mug.safetensors"), "token": "<x>"}]}
    prior, plain = load(file, config=str(config), **added), load(folder, **added)
    torch.testing.assert_close(answers(prior), answers(plain), rtol=0, atol=0)
    torch.testing.assert_close(prior.embed(["a <x>"]).text, plain.embed(["a <x>"]).text, rtol=0, atol=0)
    assert not torch.equal(answers(prior)[0], answers(load(folder))[0])


def test_what_does_not_fit_is_named(single: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, file, config = single
    tensors = load_file(file)

    def refused(message: str, changed: Tensors, key: str = KEY, **options: Any) -> None:
        save_file(changed, tmp_path / "bad.safetensors")
        with pytest.raises(PriorError, match=rf"{key}.*{message}") as error:
            load(tmp_path / "bad.safetensors", **{"config": str(config), **options})
        assert len(str(error.value)) < 500

    name = "model.diffusion_model.time_embed.0.weight"
    refused(
        "the unet of .* lacks 1 weights; the first is time_embedding", {k: v for k, v in tensors.items() if k != name}
    )
    wrong = tensors | {name: normal(3, 8)}
    refused(r"the unet of .* has \(3, 8\) where \(32, 8\) is expected; the weight is time_embedding", wrong)
    refused("has the type torch.int8 in time_embedding", tensors | {name: tensors[name].to(torch.int8)})
    strange = tensors | {"model.diffusion_model.middle_block.0.in_layers.9.weight": normal(2)}
    refused("the unet of .* has 1 unknown weights; the first is mid_block", strange)
    refused("is not a model of Stable Diffusion 1, 2, XL or 3 or FLUX.1 in the layout", {"x": normal(2)})
    # The packaged configuration is of full size.
    refused(
        "the unet of .* lacks .* weights; .* or set prior.config to a folder", tensors, config="stable-diffusion-xl"
    )
    refused("neither an existing folder nor a hub id", tensors, r"^prior\.config: ", config="unknown-layout")
    large = copy_with(config, tmp_path / "large", "unet/config.json", layers_per_block=10**9)
    refused("the unet of .* cannot be loaded: config.json has layers_per_block", tensors, config=str(large))
    without = shutil.copytree(config, tmp_path / "without")
    shutil.rmtree(without / "tokenizer")
    refused("its folder tokenizer/ is missing", tensors, r"^prior\.config: ", config=str(without))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PriorError, match=rf"{KEY}.*cut.safetensors is not a complete safetensors file: "):
        load(tmp_path / "cut.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(PriorError, match=rf"{KEY}.*is not a .safetensors file; convert it"):
        load(tmp_path / "model.ckpt")
    with pytest.raises(PriorError, match=r"^prior\.config: only single files need a configuration; remove"):
        load(folder, config=str(config))


def test_a_missing_tokenizer_is_one_sentence(
    single: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``prior.config``, it is taken from the model on the hub, which is not in the cache."""
    _, file, config = single
    layouts = tmp_path / "layouts"
    copy_with(config, layouts / "stable-diffusion-xl", _name_or_path="owner/model")
    monkeypatch.setattr(single_file, "LAYOUTS", layouts)
    message = r"^prior\.config: .* has no tokenizer, and owner/model, from which it is taken, is not in the cache or on"
    with pytest.raises(PriorError, match=message) as error:
        load(file)
    assert len(str(error.value)) < 500
