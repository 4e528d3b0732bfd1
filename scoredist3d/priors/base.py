"""What a prior is: schedule, encoder, conditioning and denoiser, whatever the network was trained to predict."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from scoredist3d.cameras import Cameras
from scoredist3d.diffusion.schedule import NoiseSchedule, PredictionType, per_item


@dataclass(frozen=True)
class Prediction:
    """One denoiser output; the noise, the clean image and the velocity it stands for are converted on demand.

    Attributes:
        output: (B, C, h, w), what the network predicted.
        kind: What ``output`` is.
        x_t: (B, C, h, w), the network's input.
        t: (B,), its timestep in [0, 1].
        schedule: Converts between the kinds.
    """

    output: Tensor
    kind: PredictionType
    x_t: Tensor
    t: Tensor
    schedule: NoiseSchedule

    @cached_property
    def eps(self) -> Tensor:
        """(B, C, h, w), the noise in ``x_t``."""
        return self.schedule.to_eps(self.output, self.x_t, self.t, self.kind)

    @cached_property
    def x0(self) -> Tensor:
        """(B, C, h, w), the clean image in ``x_t``."""
        return self.schedule.to_x0(self.output, self.x_t, self.t, self.kind)

    @cached_property
    def v(self) -> Tensor:
        """(B, C, h, w), the velocity in the convention of the schedule's family."""
        return self.schedule.to_v(self.output, self.x_t, self.t, self.kind)

    def with_output(self, output: Tensor, kind: PredictionType | None = None) -> Prediction:
        """A prediction at the same (x_t, t) with another output."""
        return Prediction(output, kind or self.kind, self.x_t, self.t, self.schedule)


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told besides x_t and t, for ``B`` images.

    Attributes:
        text: (B, L, D), text embedding; its meaning belongs to the prior that made it.
        camera: (B, 16) as made by the prior's :meth:`Prior.camera_condition`, zeros where no camera is given; None for
            priors without cameras.
        pooled: (B, P), pooled text embedding of priors that use one.
    """

    text: Tensor
    camera: Tensor | None = None
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Select items by slice or index tensor."""
        return self._map(lambda part: part[index])

    def expand(self, batch: int) -> Conditioning:
        """Repeat a single item ``batch`` times without copying; a batch of that size passes through.

        Raises:
            ValueError: The conditioning holds neither one item nor ``batch`` items.
        """
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"conditioning of {len(self)} items cannot be used for a batch of {batch}")
        return self._map(lambda part: part.expand(batch, *part.shape[1:]))

    def without_camera(self) -> Conditioning:
        """The same text with the camera dropped (zeros, what the network saw in training where it had none)."""
        return self if self.camera is None else replace(self, camera=torch.zeros_like(self.camera))

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches.

        Raises:
            ValueError: A field is given in some batches and missing in others.
        """
        joined: dict[str, Any] = {}
        for part_field in fields(cls):
            name = part_field.name
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values) and any(value is not None for value in values):
                raise ValueError(f"cannot join conditionings: {name} is given in some and missing in others")
            joined[name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: function(part) for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class CFGConditions:
    """The conditionings that guidance may combine, each of ``B`` items or of one item for all.

    Attributes:
        positive: The prompt, with view words where view-dependent prompting is on.
        unconditional: What guidance steers away from: the negative prompt, or the empty prompt where there is none.
        negatives: Perp-Neg's further prompts and their (B,) weights (negative numbers).
        plain: The prompt without view words (variational networks learn it); None means ``positive``.
        empty: The empty prompt; None means ``unconditional``.
        cameras: The views, for methods that condition on them by themselves.
        extra: Further prompts that the method asked for, by its own names.
    """

    positive: Conditioning
    unconditional: Conditioning
    negatives: tuple[tuple[Conditioning, Tensor], ...] = ()
    plain: Conditioning | None = None
    empty: Conditioning | None = None
    cameras: Cameras | None = None
    extra: Mapping[str, Conditioning] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterPoints:
    """Where a network can be adapted without touching its weights (see :mod:`scoredist3d.guidance.core.score_models`).

    Attributes:
        network: The denoiser that :meth:`Prior.predict` calls.
        linears: Paths of its linear layers that low-rank adapters are put on.
        time_embedding: Path of the module whose (B, ``width``) output a further condition can be added to.
        width: Size of the time embedding.
        text_width: Size D of the text embedding that the network attends to.
    """

    network: nn.Module
    linears: tuple[str, ...]
    time_embedding: str
    width: int
    text_width: int


class Prior(nn.Module, ABC):
    """A frozen text-to-image diffusion model.

    Images are (B, H, W, 3) in [0, 1], latents (B, C, h, w) in the units the denoiser was trained on. A prior has no
    trainable parameters; gradients pass through :meth:`encode` and :meth:`decode` to their input.

    Attributes:
        schedule: The model's noise schedule.
        image_size: Side of the square images the model was trained on, pixels.
        takes_cameras: Whether the denoiser is conditioned on cameras.
        views: Images that the denoiser sees jointly; batches are multiples of it and such a group shares one noise
            timestep.
        vocabulary: Words the prior has learnt, where it has a limited and known set of them.
    """

    schedule: NoiseSchedule
    image_size: int
    takes_cameras: bool = False
    views: int = 1
    vocabulary: frozenset[str] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of ``height`` x ``width`` pixels."""

    @abstractmethod
    def encode(self, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, H, W, 3) of any size to latents of the model's size; differentiable.

        Without a generator the mean of the encoder's distribution is taken, with one a sample.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, H, W, 3), not clamped; differentiable."""

    @abstractmethod
    def embed(self, prompts: Sequence[str], cameras: Cameras | None = None) -> Conditioning:
        """One conditioning item per prompt; ``cameras`` holds one camera per prompt."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """The denoiser's output for (B, C, h, w) latents at timesteps ``t`` (B,)."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever a parent module does."""
        return super().train(False)

    def camera_condition(self, cameras: Cameras | None, batch: int) -> Tensor | None:
        """(batch, 16) camera conditioning, zeros without cameras; None for a prior that takes none."""
        return None

    def adapter_points(self) -> AdapterPoints | None:
        """Where adapters can be attached; None for a prior that is no network."""
        return None

    def limit_x0(self, x0: Tensor) -> Tensor:
        """A predicted clean image (B, C, h, w) within the range to which the model's own sampler limits it."""
        return x0

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt, in order, that are not in :attr:`vocabulary`; empty where any word is fine."""
        if self.vocabulary is None:
            return []
        return [word for word in dict.fromkeys(words_of(prompt)) if word not in self.vocabulary]


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, numbers and punctuation left out."""
    return re.findall(r"[^\W\d_]+", text.lower())


def vocabulary_of(entries: Iterable[str]) -> frozenset[str]:
    """The set of single words in a list of words and phrases."""
    return frozenset(word for entry in entries for word in words_of(entry))


def predict_each(prior: Prior, x_t: Tensor, t: Tensor, conditionings: Sequence[Conditioning]) -> list[Prediction]:
    """The predictions at one (x_t, t) under several conditionings, from one batched forward pass."""
    batch, count = len(x_t), len(conditionings)
    joined = Conditioning.cat([conditioning.expand(batch) for conditioning in conditionings])
    prediction = prior.predict(x_t.repeat(count, *[1] * (x_t.ndim - 1)), t.repeat(count), joined)
    outputs = prediction.output.chunk(count)
    return [Prediction(output, prediction.kind, x_t, t, prior.schedule) for output in outputs]


def guided_prediction(
    prior: Prior, x_t: Tensor, t: Tensor, conditions: CFGConditions, scale: float, *, rescale: float = 0.0
) -> Prediction:
    """Classifier-free guidance, eps_u + scale (eps_c - eps_u), with one forward pass over the conditions the scale needs.

    Scale 1 runs the positive condition alone and scale 0 the unconditional one. With ``conditions.negatives`` the direction
    is Perp-Neg's (arXiv 2304.04968): e_pos + sum_i w_i perp(e_i, e_pos), each e relative to the unconditional
    prediction. All combinations have weights that sum to 1 at a fixed (x_t, t), so they are formed in the network's own
    parametrisation and mean the same in eps, x_0 and v.

    Args:
        prior: The denoiser.
        x_t: (B, C, h, w).
        t: (B,) in [0, 1].
        conditions: What to combine.
        scale: gamma in the meaning of diffusers.
        rescale: Share in [0, 1] of the guided x_0 that is scaled to the standard deviation of the positive branch's x_0
            (arXiv 2305.08891, section 3.4, in the x_0 form of MVDream), per group of jointly denoised views.
    """
    if scale == 0.0:
        return predict_each(prior, x_t, t, [conditions.unconditional])[0]
    if scale == 1.0 and not conditions.negatives:
        return predict_each(prior, x_t, t, [conditions.positive])[0]
    return guided_and_unconditional(prior, x_t, t, conditions, scale, rescale=rescale)[0]


def guided_and_unconditional(
    prior: Prior, x_t: Tensor, t: Tensor, conditions: CFGConditions, scale: float, *, rescale: float = 0.0
) -> tuple[Prediction, Prediction]:
    """:func:`guided_prediction` at any scale and the unconditional branch it contains, from the same forward pass."""
    negatives = [conditioning for conditioning, _ in conditions.negatives]
    conditionings = [conditions.positive, conditions.unconditional, *negatives]
    positive, unconditional, *others = predict_each(prior, x_t, t, conditionings)
    guided = unconditional.output + scale * (positive.output - unconditional.output)
    if others:
        weights = [weights for _, weights in conditions.negatives]
        outputs = [other.output for other in others]
        guided = guided + scale * perp_neg(positive.output, outputs, weights, unconditional.output)
    prediction = positive.with_output(guided)
    if rescale > 0.0:
        prediction = _rescaled(prediction, positive, rescale, prior.views)
    return prediction, unconditional


def perp_neg(positive: Tensor, others: Sequence[Tensor], weights: Sequence[Tensor], reference: Tensor) -> Tensor:
    """The term sum_i w_i perp(e_i - e_r, e_y - e_r) that Perp-Neg (arXiv 2304.04968) adds to the direction e_y - e_r.

    Args:
        positive: (B, C, h, w), the prediction e_y under the prompt.
        others: The same under every prompt to avoid, e_i; at least one.
        weights: (B,) each, negative numbers.
        reference: (B, C, h, w), the prediction e_r that directions are relative to.
    """
    direction = positive - reference
    terms = [
        per_item(w, other) * perpendicular(other - reference, direction)
        for other, w in zip(others, weights, strict=True)
    ]
    return sum(terms[1:], start=terms[0])


def perpendicular(a: Tensor, b: Tensor) -> Tensor:
    """The part of ``a`` orthogonal to ``b``, per item: a - <a, b> / <b, b> b."""
    dims = tuple(range(1, a.ndim))
    along = (a * b).sum(dims, keepdim=True) / b.square().sum(dims, keepdim=True).clamp_min(torch.finfo(b.dtype).tiny)
    return a - along * b


def _rescaled(guided: Prediction, positive: Prediction, share: float, views: int) -> Prediction:
    def deviation(x: Tensor) -> Tensor:
        return x.reshape(len(x) // views, -1).std(dim=1).repeat_interleave(views)

    ratio = deviation(positive.x0) / deviation(guided.x0)
    return guided.with_output(guided.x0 * per_item(share * ratio + (1.0 - share), guided.x0), "sample")
