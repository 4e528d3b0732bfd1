"""``prior.vae``: images and latents are those of the other autoencoder, and the rest of the model is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from shared.family_checks import PROMPTS, images, load, normal, train
from shared.flux_folder import build_flux
from shared.sdxl_folder import build_sdxl
from shared.stable_diffusion_folder import build_folder
from shared.toy_parts import seeded, spread, write_vae

from scoredist3d.priors.diffusers_loading import PriorError


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("sdxl"))


def kl(folder: Path, **config: Any) -> Path:
    """The folder of an AutoencoderKL alone."""
    with seeded(7):
        write_vae(folder, **{"channels": 4, "scaling_factor": 0.7, **config})
    return folder / "vae"


def tiny(folder: Path) -> Path:
    """The folder of an AutoencoderTiny alone."""
    with seeded(7):
        network = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
        spread(network).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["folder of KL", "folder of Tiny", "folder of a pipeline"])
def test_images_and_latents_are_those_of_the_other(kind: str, sdxl: Path, tmp_path: Path) -> None:
    folder = {"folder of KL": kl, "folder of Tiny": tiny}.get(kind, lambda path: path)(tmp_path)
    if kind == "folder of a pipeline":
        folder = build_folder(tmp_path, camera=False, vae="kl") / "vae"
    cls: Any = AutoencoderTiny if kind.endswith("Tiny") else AutoencoderKL
    with seeded():
        vae = cls.from_pretrained(folder)
    prior, plain = load(sdxl, vae=str(folder.parent if kind.endswith("pipeline") else folder)), load(sdxl)
    rgb = images(16)
    with torch.no_grad():
        encoded = vae.encode(2.0 * rgb.movedim(-1, 1) - 1.0)
        latents = (
            encoded.latents if cls is AutoencoderTiny else encoded.latent_dist.mode()
        ) * vae.config.scaling_factor
        torch.testing.assert_close(prior.encode(rgb), latents)
        decoded = 0.5 * vae.decode(latents / vae.config.scaling_factor).sample + 0.5
        torch.testing.assert_close(prior.decode(latents), decoded.movedim(1, -1))
        assert (prior.encode(rgb) - plain.encode(rgb)).abs().mean() > 1e-3
        x, t, text = normal(2, 4, 8, 8), torch.tensor([0.3, 0.8]), plain.embed(PROMPTS)
        torch.testing.assert_close(prior.predict(x, t, text).output, plain.predict(x, t, text).output, rtol=0, atol=0)
    train(prior, "sds")


def test_its_own_configuration_decides_about_float32(sdxl: Path, tmp_path: Path) -> None:
    """The autoencoder of the folder overflows in float16; the other one was repaired."""
    assert load(sdxl, precision="fp16").codec.dtype == torch.float32
    repaired = kl(tmp_path, force_upcast=False)
    assert load(sdxl, precision="fp16", vae=str(repaired)).codec.dtype == torch.float16


def test_what_does_not_fit_is_named(sdxl: Path, tmp_path: Path) -> None:
    flux = build_flux(tmp_path / "flux")
    pixels = build_folder(tmp_path / "pixels", camera=False, vae=None)
    cut = kl(tmp_path / "cut")
    (file,) = cut.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "none").mkdir()
    scheduler = tmp_path / "scheduler"
    scheduler.mkdir()
    (scheduler / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4}))
    cases = {
        flux: "has 16 latent channels for each 2 pixels, and .* has 4 for each 2; use an autoencoder",
        pixels: "has no vae in its model_index.json",
        cut: "the vae of .* cannot be loaded",
        tmp_path / "none": "is not a diffusers pipeline: model_index.json is missing",
        scheduler: "the vae of .* cannot be used: KeyError",
        tmp_path / "absent": "is neither an existing folder nor a hub id",
    }
    for folder, message in cases.items():
        with pytest.raises(PriorError, match=rf"^prior\.vae: .*{message}") as error:
            load(sdxl, vae=str(folder))
        assert len(str(error.value)) < 500
    with pytest.raises(PriorError, match=r"^prior\.vae: .* is a model of pixels without an autoencoder; remove"):
        load(pixels, vae=str(kl(tmp_path / "good")))
    with pytest.raises(PriorError, match=r"^prior\.vae: .*owner/vae.* is not complete in the cache"):
        load(sdxl, vae="owner/vae")
