"""Pipelines that no family covers are refused by name, in one sentence with the list of covered families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from shared.family_checks import KEY, load
from shared.toy_parts import write_index

from scoredist3d.priors import diffusers_prior
from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.pipeline_family import SUPPORTED

TRANSFORMERS = {
    "ChromaPipeline": "ChromaTransformer2DModel",
    "CogView3PlusPipeline": "CogView3PlusTransformer2DModel",
    "CogView4Pipeline": "CogView4Transformer2DModel",
    "Flux2KleinInpaintPipeline": "Flux2Transformer2DModel",
    "FluxControlPipeline": "FluxTransformer2DModel",
    "FluxKontextPipeline": "FluxTransformer2DModel",
    "HiDreamImagePipeline": "HiDreamImageTransformer2DModel",
    "HunyuanDiTPipeline": "HunyuanDiT2DModel",
    "HunyuanImagePipeline": "HunyuanImageTransformer2DModel",
    "LuminaPipeline": "LuminaNextDiT2DModel",
    "Lumina2Pipeline": "Lumina2Transformer2DModel",
    "PixArtAlphaPipeline": "PixArtTransformer2DModel",
    "QwenImageEditPipeline": "QwenImageTransformer2DModel",
    "SanaPAGPipeline": "SanaTransformer2DModel",
    "SanaSprintPipeline": "SanaTransformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
    "ZImageControlNetPipeline": "ZImageTransformer2DModel",
}
"""Pipelines and the classes of their transformers."""
OTHERS: dict[str, tuple[dict[str, list[str]], str]] = {
    "Kandinsky3Pipeline": ({"unet": ["diffusers", "Kandinsky3UNet"]}, "is a Kandinsky3UNet, not a UNet2DCondition"),
    "KandinskyV22CombinedPipeline": (
        {
            "decoder_unet": ["diffusers", "UNet2DConditionModel"],
            "prior_prior": ["diffusers", "PriorTransformer"],
        },
        "its denoiser is its decoder_unet, a UNet2DConditionModel",
    ),
    "KandinskyV22PriorPipeline": ({"prior": ["diffusers", "PriorTransformer"]}, "is its prior, a PriorTransformer"),
    "StableCascadeCombinedPipeline": (
        {"decoder": ["diffusers", "StableCascadeUNet"], "prior_prior": ["diffusers", "StableCascadeUNet"]},
        "is its decoder, a StableCascadeUNet",
    ),
    "StableCascadeDecoderPipeline": ({"decoder": ["diffusers", "StableCascadeUNet"]}, "decoder, a StableCascadeUNet"),
    "StableCascadePriorPipeline": ({"prior": ["diffusers", "StableCascadeUNet"]}, "its prior, a StableCascadeUNet"),
    "WuerstchenDecoderPipeline": ({"decoder": ["wuerstchen", "WuerstchenDiffNeXt"]}, "decoder, a WuerstchenDiffNeXt"),
    "SomebodysPipeline": ({}, r"\(SomebodysPipeline\) has no unet; only"),
}
UNETS: dict[str, tuple[dict[str, Any], str]] = {
    "KandinskyV22Pipeline": ({"addition_embed_type": "image"}, r"needs image embeddings \(Kandinsky 2.2\)"),
    "KolorsPipeline": ({"addition_embed_type": "text_time"}, r"image sizes \(Kolors"),
    "LatentConsistencyModelPipeline": ({"time_cond_proj_dim": 256}, r"guidance scale \(latent consistency models\)"),
    "StableDiffusionUpscalePipeline": ({"num_class_embeds": 1000}, "class labels"),
}


def check_refused(folder: Path, name: str, message: str) -> None:
    """Check that the error names the pipeline and the families, and is one sentence."""
    with pytest.raises(PriorError, match=KEY) as caught:
        load(folder)
    text = str(caught.value)
    assert f"({name})" in text and text.endswith(f"; only {SUPPORTED}")
    assert "\n" not in text and ". " not in text.removesuffix(SUPPORTED).split(str(folder))[-1]
    with pytest.raises(PriorError, match=message):
        load(folder)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_pipelines_with_transformers_are_refused(name: str, tmp_path: Path) -> None:
    network = TRANSFORMERS[name]
    folder = write_index(tmp_path, name, transformer=["diffusers", network])
    check_refused(folder, name, f"has no unet; its denoiser is its transformer, a {network}; only")


@pytest.mark.parametrize("name", OTHERS)
def test_pipelines_with_other_denoisers_are_refused(name: str, tmp_path: Path) -> None:
    parts, message = OTHERS[name]
    if "unet" in parts:
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text("{}")
    check_refused(write_index(tmp_path, name, **parts), name, message)


@pytest.mark.parametrize("name", UNETS)
def test_pipelines_whose_unet_needs_more_are_refused(name: str, tmp_path: Path) -> None:
    config, message = UNETS[name]
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    check_refused(write_index(tmp_path, name, unet=["diffusers", "UNet2DConditionModel"]), name, message)


def test_the_pipelines_are_those_of_diffusers() -> None:
    """Names that no release has would test nothing; one of them shall be unknown."""
    names = [*TRANSFORMERS, *OTHERS, *UNETS]
    unknown = [name for name in names if not hasattr(diffusers, name)]
    assert unknown == ["SomebodysPipeline"]
    covered = {name for family in diffusers_prior.FAMILIES for name in family.pipelines}
    assert covered.isdisjoint(names) and all(hasattr(diffusers, name) for name in covered)


@pytest.mark.parametrize("family", ["Sana", "AuraFlow", "FLUX.1", "FLUX.2", "Z-Image", "Qwen-Image", "PixArt-Sigma"])
def test_the_list_names_every_family(family: str) -> None:
    assert family in SUPPORTED
