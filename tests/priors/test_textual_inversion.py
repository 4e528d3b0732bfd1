"""Textual inversion: text embeddings are those of the pipeline into which diffusers loaded the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from shared.family_checks import load, normal, reference_pipeline, train
from shared.sdxl_folder import WIDTHS, build_sdxl
from shared.stable_diffusion_folder import build_folder
from shared.toy_parts import seeded

from scoredist3d.priors.diffusers_loading import PriorError

PROMPTS = ["a <mug> chair", "a red <mug>", "a red mug"]
WIDTH = 16


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("sd"), camera=False, vae="kl")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("sdxl"))


def saved(path: Path, **tensors: Any) -> str:
    save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("vectors", [1, 3])
def test_embeddings_are_the_pipelines(vectors: int, sd: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "any.safetensors", **{"<mug>": normal(vectors, WIDTH) if vectors > 1 else normal(WIDTH)})
    pipeline = reference_pipeline(StableDiffusionPipeline, sd)
    with seeded():
        pipeline.load_textual_inversion(file)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    prior, plain = load(sd, textual_inversion=file), load(sd)
    torch.testing.assert_close(prior.embed(PROMPTS).text, expected)
    assert (prior.embed(PROMPTS[:2]).text - plain.embed(PROMPTS[:2]).text).abs().mean() > 1e-3
    torch.testing.assert_close(prior.embed(PROMPTS[2:]).text, plain.embed(PROMPTS[2:]).text)
    train(prior, "vsd")


def test_both_text_encoders_receive_their_vectors(sdxl: Path, tmp_path: Path) -> None:
    tensors = {"clip_l": normal(2, WIDTHS[0]), "clip_g": normal(2, WIDTHS[1], seed=2)}
    file = saved(tmp_path / "<mug>.safetensors", **tensors)
    pipeline = reference_pipeline(StableDiffusionXLPipeline, sdxl)
    with seeded():
        for part, name in (("", "clip_l"), ("_2", "clip_g")):
            encoder, tokenizer = (getattr(pipeline, f"{kind}{part}") for kind in ("text_encoder", "tokenizer"))
            pipeline.load_textual_inversion(
                {"<mug>": tensors[name]}, token="<mug>", text_encoder=encoder, tokenizer=tokenizer
            )
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(PROMPTS)
    found = load(sdxl, textual_inversion=[file]).embed(PROMPTS)
    torch.testing.assert_close((found.text, found.pooled), (text, pooled))


def test_files_of_other_programs(sd: Path, tmp_path: Path) -> None:
    """Their token is the name of the file, the one in the file, or the one of the options."""
    vectors = normal(2, WIDTH)
    file = saved(tmp_path / "style.safetensors", emb_params=vectors)
    expected = load(sd, textual_inversion=file).embed(["a style mug"]).text
    renamed = load(sd, textual_inversion=[{"path": file, "token": "sks"}]).embed(["a sks mug"]).text
    torch.testing.assert_close(renamed, expected)
    torch.save({"string_to_param": {"*": vectors}, "name": "sks", "step": 3}, tmp_path / "old.pt")
    with pytest.raises(PriorError, match=r"^prior\.textual_inversion: .* is a pickle; .* prior\.allow_pickle=true"):
        load(sd, textual_inversion=str(tmp_path / "old.pt"))
    old = load(sd, textual_inversion=str(tmp_path / "old.pt"), allow_pickle=True).embed(["a sks mug"]).text
    torch.testing.assert_close(old, expected)
    other = saved(tmp_path / "other.safetensors", **{"<other>": normal(WIDTH, seed=5)})
    both = load(sd, textual_inversion=[file, other])
    torch.testing.assert_close(both.embed(["a style mug"]).text, expected)
    assert (both.embed(["<other>"]).text - both.embed(["chair"]).text).abs().mean() > 1e-3


def test_what_does_not_fit_is_named(sd: Path, sdxl: Path, tmp_path: Path) -> None:
    wide = saved(tmp_path / "wide.safetensors", **{"<x>": normal(2, 7)})
    known = saved(tmp_path / "known.safetensors", **{"mug</w>": normal(2, WIDTH)})
    unet = saved(tmp_path / "unet.safetensors", a=normal(2, 2), b=normal(2, 2))
    deep = saved(tmp_path / "deep.safetensors", a=normal(2, 2, 2))
    uneven = saved(tmp_path / "uneven.safetensors", clip_l=normal(2, WIDTHS[0]), clip_g=normal(3, WIDTHS[1]))
    both = saved(tmp_path / "both.safetensors", clip_l=normal(2, WIDTH), clip_g=normal(2, WIDTH))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "wide.safetensors").read_bytes()[:-9])
    torch.save({"a": "text"}, tmp_path / "text.bin")
    cases = {
        wide: "has vectors of width 7, and the text_encoder of the model has width 16; use one",
        known: "the text_encoder already knows the token 'mug</w>' of .*; set another one with token",
        unet: "is not a textual inversion, which has the vectors of one token",
        both: "has vectors for a text_encoder_2, which the model does not have; use one",
        deep: "is not a textual inversion",
        str(tmp_path / "cut.safetensors"): "is not a complete safetensors file: ",
        str(tmp_path / "text.bin"): "is not a file of plain tensors: it has other values than tensors",
        str(tmp_path / "none.safetensors"): "is neither an existing file or folder nor a hub id",
    }
    for file, message in cases.items():
        with pytest.raises(PriorError, match=rf"^prior\.textual_inversion: .*{message}") as error:
            load(sd, textual_inversion=file, allow_pickle=True)
        assert len(str(error.value)) < 500
    with pytest.raises(PriorError, match="is not a textual inversion"):
        load(sdxl, textual_inversion=uneven)
