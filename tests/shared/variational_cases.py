"""What the tests of the variational methods share: exact phis in place of networks, and small adaptable priors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from scoredist3d.diffusion.schedule import per_item
from scoredist3d.guidance.core.score_models import ScoreModelConfig
from scoredist3d.priors import CFGConditions, Prediction
from scoredist3d.priors.analytic import GaussianMixturePrior, Mixture
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.model_files import EMBEDDED_FOLDER
from scoredist3d.seeding import Rng
from shared.embedded import LATENT_CHANNELS, LATENT_SIZE

M, S = 0.4, 0.6
SMALL = ScoreModelConfig(network="unet", channels=[4, 8], lr=1e-2)


def gaussian(parametrization: str = "epsilon") -> GaussianMixturePrior:
    """One Gaussian N(M, S^2) over (1, 2, 2) latents."""
    one = Mixture(
        torch.full((1, 1, 2, 2), M, dtype=torch.float64),
        torch.full((1, 1, 1, 1), S, dtype=torch.float64),
        torch.ones(1),
        (frozenset({"thing"}),),
    )
    return GaussianMixturePrior(GaussianMixturePrior.Config(parametrization=parametrization), mixture=one)


def blobs(parametrization: str = "epsilon") -> GaussianMixturePrior:
    """Eight overlapping Gaussians over (3, 8, 8) latents."""
    return GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8, std=0.5, parametrization=parametrization))


def conditions(prior: GaussianMixturePrior | DiffusersPrior, prompt: str = "red") -> CFGConditions:
    return CFGConditions(prior.embed([prompt]), prior.embed([""]))


def latents(shape: tuple[int, ...] = (3, 3, 8, 8), seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(guidance, z: Tensor, step: int = 0, rng: Rng | None = None, b: CFGConditions | None = None) -> Tensor:
    """dL/dz times the batch size, which is G."""
    z = z.clone().requires_grad_()
    guidance(z, b or conditions(guidance.prior), step, rng or Rng()).loss.backward()
    return z.grad * len(z)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class ExactPhi(nn.Module):
    """The exact denoiser of N(mean, std^2), elementwise; ``dirac`` per item for cameras that are not zero.

    Attributes:
        mean, std: Tensors that broadcast to the latents: all renders together.
        dirac: (B, C, h, w) or None: what each camera sees, with certainty.
    """

    def __init__(self, schedule, mean, std, dirac: Tensor | None = None) -> None:
        super().__init__()
        self.schedule, self.mean, self.std, self.dirac = schedule, mean, std, dirac
        self.cameras: list[Tensor] = []

    def predict(self, x_t, t, conditioning):
        self.cameras.append(conditioning.camera)
        alpha, sigma = (per_item(c, x_t) for c in self.schedule.coefficients(t))
        mean, std = (torch.as_tensor(value, dtype=x_t.dtype) for value in (self.mean, self.std))
        variance = std.square()
        if self.dirac is not None:
            seen = conditioning.camera.abs().sum(1).gt(0).reshape(-1, 1, 1, 1)
            dirac = self.dirac.repeat(len(x_t) // len(self.dirac), 1, 1, 1)
            mean, variance = torch.where(seen, dirac, mean), torch.where(seen, torch.zeros_like(variance), variance)
        eps = sigma * (x_t - alpha * mean) / (alpha.square() * variance + sigma.square())
        return Prediction(eps, "epsilon", x_t, t, self.schedule)


class TellTale(nn.Module):
    """Answers a given noise; with or without parameters."""

    def __init__(self, answer: Tensor, schedule) -> None:
        super().__init__()
        self.answer, self.schedule = answer, schedule

    def predict(self, x_t, t, conditioning):
        return Prediction(self.answer.repeat(len(x_t) // len(self.answer), 1, 1, 1), "epsilon", x_t, t, self.schedule)


def tiny_folder(folder: Path, *, kind: str = "epsilon", text_width: int = 128, **scheduler) -> Path:
    """The embedded pipeline with a tiny random UNet that knows no cameras, and another prediction type."""
    from diffusers import UNet2DConditionModel

    folder.mkdir(parents=True)
    for part in ("text_encoder", "tokenizer", "vae", "model_index.json"):
        (folder / part).symlink_to(EMBEDDED_FOLDER / part)
    config = json.loads((EMBEDDED_FOLDER / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler").mkdir()
    config |= {"prediction_type": kind, **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=text_width,
            attention_head_dim=2,
            norm_num_groups=4,
        ).save_pretrained(folder / "unet")
    return folder


def prior_of(folder: Path | str) -> DiffusersPrior:
    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(folder)))
