"""Networks that learn the score of the renders themselves: phi of variational score distillation.

phi is anything with ``predict(x_t, t, conditioning) -> Prediction``, the call of a prior, and its conditioning always
has a (B, 16) camera, zeros where there is none. Here are two: low-rank adapters on the prior's own network, and a small
network from scratch, which needs nothing from the prior but its schedule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.config import ComponentConfig, FieldError, Schedule, option
from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.priors.base import AdapterPoints, CFGConditions, Conditioning, Prediction, Prior
from scoredist3d.priors.camera_embedding import CAMERA_EMBEDDING_SIZE, camera_embedding
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.seeding import Rng

_COARSEST = 4


@dataclass
class ScoreModelConfig(ComponentConfig):
    """The network that learns the renders, and how it is trained."""

    network: Literal["auto", "lora", "unet"] = option(
        "auto",
        "lora: low-rank adapters on the prior's own network, whose weights are shared; unet: a small network from "
        "scratch, for any prior; auto: lora where the prior has a network.",
    )
    model: str | None = option(
        None,
        "Another diffusers folder or hub id to put the adapters on, with the prior's noise schedule, latents and text "
        "embedding, e.g. a v-prediction sibling; null takes the prior's own network.",
    )
    rank: int = option(4, "Rank of the adapters.", ge=1)
    channels: list[int] = option(
        [128, 256, 384, 512], "unet: width of each resolution, as many as the latents can be halved for.", ge=4
    )
    lr: Schedule = option(1e-4, "AdamW's learning rate; a rising schedule is a warm-up.", ge=0)
    weight_decay: float = option(0.01, "AdamW's weight decay.", ge=0)
    steps: int = option(1, "Optimiser steps of phi per step of the particles.", ge=1)
    repeats: int = option(1, "Noise timesteps and noises drawn for every render of such a step.", ge=1)
    camera_dropout: float = option(0.1, "Share of the renders that phi is told no camera for in training.", ge=0, le=1)
    replay: int = option(
        0, "Keep this many of the latest latents and train phi on draws from them; 0 trains on the step's own.", ge=0
    )

    def validate(self) -> list[str]:
        """Group norms and attention heads need even widths; a model is for adapters."""
        problems = []
        if not self.channels or any(width % 4 for width in self.channels):
            problems.append(f"channels: needs one or more multiples of 4, got {self.channels}")
        if self.model is not None and self.network == "unet":
            problems.append("model: has no effect with network=unet; use network=lora")
        return problems


class ScoreModel(nn.Module, ABC):
    """A trainable denoiser; its parameters are float32 and follow the module's device."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """The prediction for (B, C, h, w) latents at timesteps ``t`` (B,); ``conditioning.camera`` is given."""


def build_score_model(config: ScoreModelConfig, prior: Prior, rng: Rng) -> ScoreModel:
    """The configured network.

    Raises:
        ValueError: Adapters are asked for and the prior has no network, or ``model`` does not fit the prior.
    """
    points = prior.adapter_points()
    if config.network == "unet" or (config.network == "auto" and points is None and config.model is None):
        return UNetScoreModel(config, prior, rng)
    if points is None:
        raise FieldError("this prior is no network that adapters could be put on; use network=unet", "phi.network")
    if config.model is None:
        return LoraScoreModel(config, prior, points, rng)
    model = DiffusersPrior(
        DiffusersPrior.Config(pretrained_model_name_or_path=config.model), denoiser_only=True
    ).requires_grad_(False)
    other = model.adapter_points()
    _require_sibling(config.model, model, other, prior, points)
    return LoraScoreModel(config, model, other, rng, owns_model=True)


def phi_conditioning(conditions: CFGConditions, batch: int) -> Conditioning:
    """What phi is told: the prompt without view words, and the camera, zeros where there is none."""
    plain = conditions.positive if conditions.plain is None else conditions.plain
    plain = plain.expand(batch)
    if plain.camera is not None:
        return plain
    if conditions.cameras is None:
        return replace(plain, camera=plain.text.new_zeros(batch, CAMERA_EMBEDDING_SIZE))
    return replace(plain, camera=camera_embedding(conditions.cameras).to(plain.text).expand(batch, -1))


def matching_output(like: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """What the network behind ``like`` outputs when it predicts this clean image and this noise."""
    if like.kind == "epsilon":
        return eps
    if like.kind == "sample":
        return x0
    return like.schedule.velocity(x0, eps, like.t)


class LoraScoreModel(ScoreModel):
    """Low-rank adapters (arXiv 2106.09685) on the linear layers of a frozen network.

    The network keeps its own layers: the adapted ones take their places for the length of a call only. So it gives the
    same output with and without a phi beside it, several instances can adapt one network, moving or casting it leaves
    the adapters alone, and no second copy of its weights exists. The adapters start at zero, so phi starts as the base.

    A network without cameras gets them through a small network that starts at zero and is added to the time embedding.
    """

    def __init__(
        self, config: ScoreModelConfig, model: Prior, points: AdapterPoints, rng: Rng, *, owns_model: bool = False
    ) -> None:
        """Args:
        config: Rank.
        model: Whose network is adapted.
        points: Where.
        rng: Initialises the adapters.
        owns_model: Nobody else has the model, so it is moved along.
        """
        super().__init__()
        # Outside of the module tree, like the prior of a guidance.
        self._outside = (model, points)
        self._owns_model = owns_model
        paths = [path.rpartition(".")[::2] for path in points.linears]
        self._places = [(points.network.get_submodule(parent), name) for parent, name in paths]
        with _seeded(rng, "phi"):
            self._adapted = _adapted([getattr(parent, name) for parent, name in self._places], config.rank)
            self.camera = None if model.takes_cameras else _camera_network(points.width)
        self.down = nn.ModuleList(layer.lora_A[_ADAPTER] for layer in self._adapted)
        self.up = nn.ModuleList(layer.lora_B[_ADAPTER] for layer in self._adapted)
        self.float().requires_grad_(True)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """The model's prediction with the adapters on."""
        model, _ = self._outside
        camera = conditioning.camera
        told = conditioning if model.takes_cameras else replace(conditioning, camera=None)
        with self._attached(camera):
            return model.predict(x_t, t, told)

    @contextmanager
    def _attached(self, camera: Tensor | None) -> Iterator[None]:
        """The adapted layers in the places of the network's own, and the camera on its time embedding."""
        hook = None if self.camera is None or camera is None else self._add_to_time_embedding(camera)
        own = [getattr(parent, name) for parent, name in self._places]
        try:
            for (parent, name), layer in zip(self._places, self._adapted, strict=True):
                setattr(parent, name, layer)
            yield
        finally:
            for (parent, name), layer in zip(self._places, own, strict=True):
                setattr(parent, name, layer)
            if hook is not None:
                hook.remove()

    def _add_to_time_embedding(self, camera: Tensor) -> torch.utils.hooks.RemovableHandle:
        assert self.camera is not None
        with torch.autocast(camera.device.type, enabled=False):
            added = self.camera(camera.float())
        _, points = self._outside
        module = points.network.get_submodule(points.time_embedding)
        return module.register_forward_hook(lambda _, __, embedding: (embedding + added).to(embedding.dtype))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Take along a model of its own."""
        if self._owns_model:
            self._outside[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class UNetScoreModel(ScoreModel):
    """A small UNet from scratch that is told the timestep and the camera, but no text: it learns one prompt's renders.

    It predicts the velocity for which x_0 and eps have equal coefficients in the schedule's own alpha and sigma, and
    starts at zero: then eps = sigma x_t / (alpha^2 + sigma^2), the exact answer for latents that are standard normal.
    """

    def __init__(self, config: ScoreModelConfig, prior: Prior, rng: Rng) -> None:
        """Args:
        config: Widths.
        prior: Gives the schedule and the size of the latents.
        rng: Initialises the weights.
        """
        super().__init__()
        from diffusers import UNet2DModel

        channels, height, width = prior.latent_shape(prior.image_size, prior.image_size)
        widths = config.channels[: _resolutions(min(height, width))]
        deeper = len(widths) - 1
        self.schedule = StandardVelocity(prior.schedule)
        with _seeded(rng, "phi"):
            self.network = UNet2DModel(
                sample_size=(height, width),
                in_channels=channels,
                out_channels=channels,
                block_out_channels=tuple(widths),
                down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * deeper),
                up_block_types=(*["AttnUpBlock2D"] * deeper, "UpBlock2D"),
                norm_num_groups=math.gcd(32, *widths),
                attention_head_dim=math.gcd(8, *widths),
                class_embed_type="identity",
            )
            self.camera = _camera_network(4 * widths[0])
        nn.init.zeros_(self.network.conv_out.weight)
        nn.init.zeros_(self.network.conv_out.bias)
        self._multiple = 2**deeper

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """The network's prediction; sizes that do not halve evenly are padded for it."""
        height, width = x_t.shape[-2:]
        with torch.autocast(x_t.device.type, enabled=False):
            x = functional.pad(x_t.float(), (0, -width % self._multiple, 0, -height % self._multiple), "replicate")
            camera = self.camera(conditioning.camera.float())  # type: ignore[union-attr]
            output = self.network(x, self.schedule.model_timestep(t), class_labels=camera, return_dict=False)[0]
        output = output[..., :height, :width].to(x_t.dtype)
        return Prediction(output, "v_prediction", x_t, t, self.schedule)


class StandardVelocity(NoiseSchedule):
    """Another schedule's timesteps with the velocity v = (alpha eps - sigma x_0) / (alpha^2 + sigma^2).

    It is the usual one of variance-preserving chains, and for latents of unit variance v = 0 is the best guess at every
    timestep of any schedule.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        """Args:
        schedule: Whose timesteps are meant.
        """
        self._schedule = schedule
        self.prediction_type = "v_prediction"
        self.num_train_timesteps = schedule.num_train_timesteps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """As the other schedule's."""
        return self._schedule.coefficients(t)

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma over alpha^2 + sigma^2."""
        alpha, sigma = self.coefficients(t)
        power = alpha.square() + sigma.square()
        return alpha / power, sigma / power

    def quantize(self, t: Tensor) -> Tensor:
        """As the other schedule's."""
        return self._schedule.quantize(t)

    def model_timestep(self, t: Tensor) -> Tensor:
        """As the other schedule's."""
        return self._schedule.model_timestep(t)


_ADAPTER = "phi"


def _adapted(linears: list[nn.Module], rank: int) -> list[Any]:
    """The layers with new adapters around them; the layers themselves are not changed."""
    from peft import LoraConfig, inject_adapter_in_model

    wrapped = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=r"\d+"), nn.ModuleList(linears), _ADAPTER
    )
    return list(wrapped.children())


def _camera_network(width: int) -> nn.Sequential:
    """(B, 16) -> (B, width), zero at the start."""
    network = nn.Sequential(nn.Linear(CAMERA_EMBEDDING_SIZE, width), nn.SiLU(), nn.Linear(width, width))
    last = network[-1]
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return network


@contextmanager
def _seeded(rng: Rng, stream: str) -> Iterator[None]:
    """Let code that initialises from the global stream do so from ours, and leave the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng(stream).initial_seed())
        yield


def _resolutions(side: int) -> int:
    """How many resolutions fit: halved while the coarsest stays at 4 or above."""
    return 1 + max(0, int(math.log2(side / _COARSEST)))


def _require_sibling(name: str, model: Prior, points: AdapterPoints, prior: Prior, prior_points: AdapterPoints) -> None:
    """Refuse a model that would misread the prior's latents, timesteps or text."""
    if points.text_width != prior_points.text_width:
        raise FieldError(
            f"{name} attends to texts of width {points.text_width}, and the prior's text encoder "
            f"makes {prior_points.text_width}; use a model of the same family",
            "phi.model",
        )
    size = 8 * prior.image_size
    channels, wanted = model.latent_shape(size, size)[0], prior.latent_shape(size, size)[0]
    if channels != wanted:
        raise FieldError(f"{name} takes latents of {channels} channels, the prior's have {wanted}", "phi.model")
    t = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    if not all(map(torch.allclose, model.schedule.coefficients(t), prior.schedule.coefficients(t))):
        raise FieldError(f"the timesteps of {name} are not the prior's; use a sibling of it", "phi.model")
