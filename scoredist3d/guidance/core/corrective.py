"""Corrective network of LMC, which imitates the denoiser's blur on clean latents; functions to load and save it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.config import FieldError
from scoredist3d.files import atomic_path, write_json
from scoredist3d.paths import PACKAGE
from scoredist3d.priors.base import Prior

SHIPPED_FOLDER = PACKAGE / "assets" / "corrective"
AUTO, IDENTITY = "auto", "identity"
_KEY = "corrective"
_WEIGHTS, _CONFIG = "corrective.safetensors", "config.json"
_FINGERPRINT_TIMESTEPS = 17
_SAMPLES_PER_TENSOR = 32
_TOLERANCE = 0.01


@dataclass(frozen=True)
class CorrectiveSizes:
    """Sizes of a corrective network.

    Attributes:
        channels: Channels of the latents.
        width: Channels of the hidden layers.
        depth: Number of times the resolution is halved.
        frequencies: Octaves of the sinusoidal timestep embedding.
    """

    channels: int
    width: int = 48
    depth: int = 2
    frequencies: int = 6


class Corrective(nn.Module):
    """Network b(z, t) = z + r(z, t) for clean latents z (B, C, h, w) and timesteps t (B,).

    r is a small U-Net whose last layer is initialized to zero, so an untrained b is the identity. Its inputs are
    neither the noisy image nor the prompt. It can therefore only learn the average output of the denoiser for z, which
    is mostly a blur that grows with t. The network is deliberately shallow: one that learns the exact average would
    cancel LMC's pull towards the image manifold everywhere on its training data.
    """

    def __init__(self, sizes: CorrectiveSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        self.level = nn.Sequential(
            nn.Linear(2 * sizes.frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.first = nn.Conv2d(sizes.channels, width, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(sizes.depth))
        self.skip = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(sizes.depth + 1))
        self.up = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(sizes.depth))
        self.shift = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(sizes.depth + 1))
        self.last = nn.Conv2d(width, sizes.channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """b(z, t) (B, C, h, w) in the dtype of ``z``; computed in the dtype of the weights, without autocast."""
        dtype = self.first.weight.dtype
        with torch.autocast(z.device.type, enabled=False):
            return z + self._residual(z.to(dtype), t.to(dtype)).to(z.dtype)

    def _residual(self, z: Tensor, t: Tensor) -> Tensor:
        code = self.level(self._timestep_embedding(t))
        x = self.first(z)
        skipped = []
        for stage, (skip, shift) in enumerate(zip(self.skip, self.shift, strict=True)):
            x = self.down[stage - 1](x) if stage else x
            scale, offset = shift(code)[:, :, None, None].chunk(2, dim=1)
            x = functional.silu((1.0 + scale) * x + offset)
            skipped.append(functional.silu(skip(x)))
        x = skipped.pop()
        for up in self.up:
            finer = skipped.pop()
            x = functional.silu(up(functional.interpolate(x, finer.shape[-2:], mode="nearest") + finer))
        residual: Tensor = self.last(x)
        return residual

    def _timestep_embedding(self, t: Tensor) -> Tensor:
        octaves = math.pi * 2.0 ** torch.arange(self.sizes.frequencies, dtype=t.dtype, device=t.device)
        angles = t[:, None] * octaves
        return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True)
class Fingerprint:
    """Summary of a prior, stored with a corrective and compared when the corrective is loaded.

    Fingerprints are compared with a tolerance, not hashed, because the same prior has slightly different weights in
    fp32, fp16 and bf16. The parametrization of the network's output is not included, because a corrective imitates
    predicted images.

    Attributes:
        latent_shape: (C, h, w) at the native image size of the prior.
        coefficients: (L, 2), alpha and sigma at evenly spaced timesteps.
        weights: (M,), a few values of every parameter and buffer of the prior, in order.
    """

    latent_shape: tuple[int, int, int]
    coefficients: Tensor
    weights: Tensor

    @classmethod
    def of(cls, prior: Prior) -> Fingerprint:
        """Fingerprint of a prior."""
        t = torch.linspace(0.0, 1.0, _FINGERPRINT_TIMESTEPS, dtype=torch.float64)
        coefficients = torch.stack(prior.schedule.coefficients(t), dim=1).float()
        tensors = [tensor.detach().flatten() for tensor in (*prior.parameters(), *prior.buffers())]
        picked = [_sampled(values) for values in tensors if values.is_floating_point() and len(values)]
        weights = torch.cat(picked).cpu() if picked else torch.zeros(0)
        return cls(prior.latent_shape(prior.image_size, prior.image_size), coefficients, weights)

    def differs_from(self, other: Fingerprint) -> str | None:
        """Description of the first difference from another fingerprint; None if they agree."""
        if self.latent_shape != other.latent_shape:
            return f"latents of shape {self.latent_shape}, not {other.latent_shape}"
        if not torch.allclose(self.coefficients, other.coefficients, rtol=0.0, atol=1e-4):
            return "a different noise schedule"
        if len(self.weights) != len(other.weights):
            return "a different network"
        if (self.weights - other.weights).norm() > _TOLERANCE * self.weights.norm():
            return "different weights"
        return None


def _sampled(values: Tensor) -> Tensor:
    """A few elements at golden-ratio spacing; an even stride could select the same column of every row."""
    turns = 0.6180339887498949 * torch.arange(_SAMPLES_PER_TENSOR, dtype=torch.float64)
    return values[(turns.frac() * len(values)).long().to(values.device)].float()


def load_corrective(choice: str, prior: Prior) -> Corrective | None:
    """Frozen corrective selected by ``guidance.corrective``.

    Args:
        choice: ``identity`` for no corrective, ``auto`` for the corrective of the embedded prior, or a folder written
            by ``scripts/train_corrective.py``.
        prior: Prior whose fingerprint must match that of the corrective.

    Returns:
        The corrective; None for ``identity``.

    Raises:
        ValueError: The folder contains no corrective, or it was trained for another prior.
    """
    if choice == IDENTITY:
        return None
    folder = SHIPPED_FOLDER if choice == AUTO else Path(choice).expanduser()
    if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
        raise FieldError(f"{folder} does not contain {_CONFIG} and {_WEIGHTS}; run scripts/train_corrective.py", _KEY)
    network, fingerprint = read_corrective(folder)
    difference = fingerprint.differs_from(Fingerprint.of(prior))
    if difference is None:
        return network
    if choice == AUTO:
        raise FieldError(
            f"auto selects the corrective of the embedded prior, which does not fit this prior ({difference}); "
            "train a corrective with scripts/train_corrective.py and set its folder here, or set identity to use none",
            _KEY,
        )
    raise FieldError(
        f"{folder} was trained for another prior ({difference}); train a corrective for this prior with "
        "scripts/train_corrective.py",
        _KEY,
    )


def read_corrective(folder: Path) -> tuple[Corrective, Fingerprint]:
    """Frozen fp32 corrective in a folder, and the fingerprint of the prior that it was trained for.

    Raises:
        ValueError: The files do not contain a corrective.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        tensors = {name: tensor.float() for name, tensor in load_file(folder / _WEIGHTS).items()}
        fingerprint = Fingerprint(
            tuple(config["latent_shape"]), tensors.pop("fingerprint.coefficients"), tensors.pop("fingerprint.weights")
        )
        with torch.device("meta"):  # initial weights would be drawn from the global generator
            network = Corrective(CorrectiveSizes(**config["sizes"]))
        network.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise FieldError(
            f"cannot read a corrective from {folder}; write it again with scripts/train_corrective.py: "
            f"{str(error).splitlines()[0]}",
            _KEY,
        ) from error
    return network.requires_grad_(False).eval(), fingerprint


def save_corrective(folder: Path, network: Corrective, prior: Prior, notes: dict[str, Any]) -> None:
    """Write the weights in fp16, the prior's fingerprint, the sizes and ``notes``; each file is written atomically."""
    fingerprint = Fingerprint.of(prior)
    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in network.state_dict().items()}
    tensors["fingerprint.coefficients"] = fingerprint.coefficients
    tensors["fingerprint.weights"] = fingerprint.weights
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / _WEIGHTS) as temporary:
        save_file(tensors, temporary)
    write_json(
        folder / _CONFIG,
        {"sizes": asdict(network.sizes), "latent_shape": list(fingerprint.latent_shape), **notes},
    )
