"""Score models of variational score distillation: trainable networks phi that learn the score of the renders.

A score model has the same method ``predict(x_t, t, conditioning) -> Prediction`` as a prior. Its conditioning always
contains a (B, 16) camera embedding, which is zero if there is no camera. There are two kinds: low-rank adapters on
the prior's own network, and a small UNet trained from scratch, which uses only the prior's noise schedule and latent
size.
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
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.standard_velocity import StandardVelocity
from scoredist3d.limits import MAX_BATCH, MAX_FEATURES, MAX_STORED_LATENTS, MAX_WIDTH
from scoredist3d.nn.unregistered import Unregistered
from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.base import Prior
from scoredist3d.priors.camera_embedding import CAMERA_EMBEDDING_SIZE, camera_embedding
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.seeding import Rng

_COARSEST = 4


@dataclass
class ScoreModelConfig(ComponentConfig):
    """Architecture and training of the score model phi."""

    network: Literal["auto", "lora", "unet"] = option(
        "auto",
        "lora: low-rank adapters on the prior's network, whose weights are shared; unet: a small network trained from "
        "scratch, for any prior; auto: lora if the prior has a network, otherwise unet.",
    )
    model: str | None = option(
        None,
        "Diffusers folder or hub id of another model whose network receives the adapters, e.g. a v-prediction model "
        "with the prior's noise schedule, latents and text embedding; null uses the prior's own network.",
    )
    rank: int = option(4, "Rank of the adapters.", ge=1, le=MAX_FEATURES)
    channels: list[int] = option(
        [128, 256, 384, 512],
        "unet: width at each resolution; resolutions below 4 latent pixels are omitted.",
        ge=4,
        le=MAX_WIDTH,
    )
    lr: Schedule = option(1e-4, "Learning rate of AdamW; a schedule may add a warm-up.", ge=0)
    weight_decay: float = option(0.01, "Weight decay of AdamW.", ge=0)
    steps: int = option(1, "Optimizer steps of phi per step of the particles.", ge=1)
    repeats: int = option(
        1, "Number of timesteps and noise samples drawn per render in each optimizer step of phi.", ge=1, le=MAX_BATCH
    )
    camera_dropout: float = option(0.1, "Probability of training phi on a render without its camera.", ge=0, le=1)
    replay: int = option(
        0,
        "Size of the replay buffer of recent latents that phi is trained on; 0 trains on the current latents.",
        ge=0,
        le=MAX_STORED_LATENTS,
    )

    def validate(self) -> list[str]:
        """Require widths that fit group norms and attention heads, and adapters if ``model`` is set."""
        problems = []
        if not self.channels or any(width % 4 for width in self.channels):
            problems.append(f"channels: needs one or more multiples of 4, got {self.channels}")
        if self.model is not None and self.network == "unet":
            problems.append("model: has no effect with network=unet; use network=lora")
        return problems


class ScoreModel(nn.Module, ABC):
    """Trainable denoiser with float32 parameters."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Prediction for (B, C, h, w) latents at timesteps ``t`` (B,); ``conditioning.camera`` must not be None."""


def build_score_model(config: ScoreModelConfig, prior: Prior, rng: Rng) -> ScoreModel:
    """Build the configured score model.

    Raises:
        ValueError: Adapters are configured and the prior has no network, or ``model`` does not fit the prior.
    """
    points = prior.adapter_points()
    if config.network == "unet" or (config.network == "auto" and points is None and config.model is None):
        return UNetScoreModel(config, prior, rng)
    if points is None:
        raise FieldError("this prior has no network that adapters can be attached to; use network=unet", "phi.network")
    if config.model is None:
        return LoraScoreModel(config, prior, points, rng)
    sibling = prior.sibling(config.model, key="guidance.phi.model").requires_grad_(False)
    return LoraScoreModel(config, sibling, sibling.adapter_points(), rng, owns_model=True)


def phi_conditioning(conditions: CFGConditions, batch: int) -> Conditioning:
    """Conditioning of a score model: prompt without view words, and camera embedding (zeros without a camera)."""
    plain = conditions.positive if conditions.plain is None else conditions.plain
    plain = plain.expand(batch)
    if plain.camera is not None:
        return plain
    if conditions.cameras is None:
        return replace(plain, camera=plain.text.new_zeros(batch, CAMERA_EMBEDDING_SIZE))
    return replace(plain, camera=camera_embedding(conditions.cameras).to(plain.text).expand(batch, -1))


def matching_output(like: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """Training target for a clean image and its noise, in the parametrization of ``like``."""
    if like.kind == "epsilon":
        return eps
    if like.kind == "sample":
        return x0
    return like.schedule.velocity(x0, eps, like.t)


class LoraScoreModel(ScoreModel):
    """Low-rank adapters (arXiv 2106.09685) on the linear layers of a frozen network.

    The adapted layers replace the network's own layers only during a call. Outside of a call the network is unchanged,
    so several score models can share it, moving or casting it does not affect the adapters, and its weights exist only
    once. The adapters start at zero: initially phi equals the frozen network.

    A network without camera conditioning receives the camera through a small network that is initialized to zero and
    whose output is added to the time embedding.
    """

    def __init__(
        self,
        config: ScoreModelConfig,
        model: Prior | DenoiserNetwork,
        points: AdapterPoints,
        rng: Rng,
        *,
        owns_model: bool = False,
    ) -> None:
        """Create adapters for a denoiser.

        Args:
            config: Rank of the adapters.
            model: Denoiser to adapt.
            points: Adapter points of ``model``.
            rng: Random generators for the adapters' initial weights.
            owns_model: Whether ``model`` belongs to this module alone and is moved with it.
        """
        super().__init__()
        self._model = Unregistered(model)
        self._points = points
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
        """Prediction of the model with the adapters attached."""
        model = self._model.value
        camera = conditioning.camera
        inputs = conditioning if model.takes_cameras else replace(conditioning, camera=None)
        with self._attached(camera):
            return model.predict(x_t, t, inputs)

    @contextmanager
    def _attached(self, camera: Tensor | None) -> Iterator[None]:
        """Attach the adapted layers and add the camera to the time embedding; undo both at exit."""
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
        """Register a hook that adds the camera network's output to the time embedding."""
        assert self.camera is not None
        with torch.autocast(camera.device.type, enabled=False):
            added = self.camera(camera.float())
        module = self._points.network.get_submodule(self._points.time_embedding)
        return module.register_forward_hook(lambda _, __, embedding: (embedding + added).to(embedding.dtype))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Apply ``fn`` to the module and to an owned model, which is outside the module tree."""
        if self._owns_model:
            self._model.value._apply(fn, recurse)
        return super()._apply(fn, recurse)


class UNetScoreModel(ScoreModel):
    """Small UNet conditioned on the timestep and the camera but not on text: it learns the renders of one prompt.

    It predicts the velocity of :class:`~scoredist3d.diffusion.standard_velocity.StandardVelocity`. Its initial output
    is zero, i.e. eps = sigma x_t / (alpha^2 + sigma^2), the exact prediction for standard normal latents.
    """

    def __init__(self, config: ScoreModelConfig, prior: Prior, rng: Rng) -> None:
        """Create the network.

        Args:
            config: Widths of the network.
            prior: Determines the noise schedule and the latent size.
            rng: Random generators for the initial weights.
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
        """Prediction of the network, which pads latents whose size is not divisible by its downsampling factor."""
        height, width = x_t.shape[-2:]
        with torch.autocast(x_t.device.type, enabled=False):
            x = functional.pad(x_t.float(), (0, -width % self._multiple, 0, -height % self._multiple), "replicate")
            camera = self.camera(conditioning.camera.float())  # type: ignore[union-attr]
            output = self.network(x, self.schedule.model_timestep(t), class_labels=camera, return_dict=False)[0]
        output = output[..., :height, :width].to(x_t.dtype)
        return Prediction(output, "v_prediction", x_t, t, self.schedule)


_ADAPTER = "phi"


def _adapted(linears: list[nn.Module], rank: int) -> list[Any]:
    """Layers wrapped in new adapters; the original layers are not changed."""
    from peft import LoraConfig, inject_adapter_in_model

    wrapped = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=r"\d+"), nn.ModuleList(linears), _ADAPTER
    )
    return list(wrapped.children())


def _camera_network(width: int) -> nn.Sequential:
    """Network (B, 16) -> (B, width) whose output is initially zero."""
    network = nn.Sequential(nn.Linear(CAMERA_EMBEDDING_SIZE, width), nn.SiLU(), nn.Linear(width, width))
    last = network[-1]
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return network


@contextmanager
def _seeded(rng: Rng, stream: str) -> Iterator[None]:
    """Seed the global random generator from ``stream`` for library code that uses it; restore its state at exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng(stream).initial_seed())
        yield


def _resolutions(side: int) -> int:
    """Number of resolutions, each half of the previous one, down to a side of at least 4."""
    return 1 + max(0, int(math.log2(side / _COARSEST)))
