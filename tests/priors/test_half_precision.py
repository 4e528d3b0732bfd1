"""The families compute in half precision on the CPU and agree roughly with single precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from shared.aura_flow_folder import build_aura_flow
from shared.deepfloyd_folder import build_deepfloyd
from shared.family_checks import PROMPTS, images, load, normal, t_of
from shared.flow_folder import build_flow
from shared.flux_2_folder import build_flux_2
from shared.flux_folder import build_flux
from shared.pixart_folder import build_pixart
from shared.qwen_image_folder import build_qwen_image
from shared.sana_folder import build_sana
from shared.sdxl_folder import build_sdxl
from shared.z_image_folder import build_z_image
from torch import Tensor

from scoredist3d.priors import CFGConditions
from scoredist3d.priors.diffusers_prior import DiffusersPrior

Loader = Callable[..., DiffusersPrior]
FOLDERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "sdxl": (build_sdxl, 16),
    "deepfloyd": (partial(build_deepfloyd, thresholding=False), 16),
    "deepfloyd-upscaler": (partial(build_deepfloyd, thresholding=False, stage=2), 16),
    "stable-diffusion-3": (build_flow, 64),
    "pixart": (build_pixart, 16),
    "flux": (build_flux, 16),
    "z-image": (build_z_image, 16),
    "qwen-image": (build_qwen_image, 32),
    "sana": (build_sana, 16),
    "aura-flow": (build_aura_flow, 16),
    "flux-2": (build_flux_2, 16),
    "flux-2-klein": (partial(build_flux_2, klein=True), 16),
}
"""Function that writes the folder, and side of its images."""


def outputs(prior: DiffusersPrior) -> list[Tensor]:
    """Latents, image and prediction for fixed inputs."""
    latents = prior.encode(images(prior.image_size))
    text = prior.embed(PROMPTS)
    conditions = prior.with_image(CFGConditions(text, text), latents, torch.Generator().manual_seed(0))
    x_t = normal(*latents.shape)
    # FLUX.1 and Qwen-Image round timesteps and guidance to the precision of the network, as their pipelines do; these
    # ones are exact in bfloat16.
    t = torch.tensor([t_of(prior.schedule, 250.0), t_of(prior.schedule, 500.0)])
    prediction = prior.predict(x_t, t, conditions.positive).output
    return [latents, prior.decode(x_t), prediction]


@pytest.fixture(scope="module", params=FOLDERS)
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loader, list[Tensor]]:
    """A function that loads the prior of a family in a precision, and its outputs in float32."""
    build, side = FOLDERS[request.param]
    folder = build(tmp_path_factory.mktemp(request.param))
    options = {"distilled_guidance": 2.0} if request.param in ("flux", "flux-2") else {}
    loader = partial(load, folder, image_size=side, **options)
    with torch.no_grad():
        return loader, outputs(loader())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(precision: str, single: tuple[Loader, list[Tensor]]) -> None:
    loader, exact = single
    with torch.no_grad():
        rounded = outputs(loader(precision=precision))
    for full, half in zip(exact, rounded, strict=True):
        assert half.dtype == full.dtype == torch.float32
        assert (full - half).square().mean().sqrt() < 0.1 * full.std()
