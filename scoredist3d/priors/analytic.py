"""A prior with a closed-form denoiser: a mixture of Gaussians.

It serves as the reference solution in tests and as the smallest example of a prior. The text selects components of
the mixture, and the exact prediction takes the place of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from scoredist3d.cameras import Cameras
from scoredist3d.config import ComponentConfig, option
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import FlowSchedule, NoiseSchedule, VPSchedule
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.vocabulary import vocabulary_of, words_of
from scoredist3d.registry import register

_BLOB_COLORS = {
    "red": (0.9, 0.15, 0.1),
    "green": (0.15, 0.7, 0.2),
    "blue": (0.1, 0.25, 0.9),
    "yellow": (0.95, 0.85, 0.15),
}
_BLOB_PLACES = {"left": -0.4, "right": 0.4}


@dataclass(frozen=True)
class Mixture:
    """K Gaussians over latents of shape (C, h, w).

    Attributes:
        means: (K, C, h, w).
        stds: (K, C, h, w), standard deviation of every element; may be a broadcast view of (K, 1, 1, 1).
        weights: (K,), non-negative.
        labels: The words that describe each component.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    labels: tuple[frozenset[str], ...]

    def __post_init__(self) -> None:
        count = len(self.means)
        if self.means.ndim != 4 or self.stds.ndim != 4 or len(self.stds) != count:
            raise ValueError(
                f"means and stds must have shape (K, C, h, w) with equal K, got {tuple(self.means.shape)} and "
                f"{tuple(self.stds.shape)}"
            )
        if tuple(self.weights.shape) != (count,) or len(self.labels) != count:
            raise ValueError(f"a mixture of {count} components needs {count} weights and {count} sets of labels")


@register("prior", "gaussian-mixture", summary="Exact denoiser of a mixture of Gaussians, conditioned on words.")
class GaussianMixturePrior(Prior):
    """A mixture of Gaussians with the exact prediction at every timestep.

    With x_t = alpha x_0 + sigma eps and component k = N(m_k, s_k^2), the marginal of x_t is a mixture of
    N(alpha m_k, D_k), D_k = alpha^2 s_k^2 + sigma^2. With responsibilities r_k of the components given x_t,

        eps = sigma sum_k r_k (x_t - alpha m_k) / D_k          (minus sigma times the score)
        x_0 = sum_k r_k (m_k + alpha s_k^2 (x_t - alpha m_k) / D_k)

    A prompt selects the components whose labels contain the largest number of its words: "red" selects all red ones,
    "a red left blob" one of them, and the empty prompt all components. The text embedding of a prompt is the (1, K)
    tensor of component weights.
    """

    @dataclass
    class Config(ComponentConfig):
        """Options of the mixture and of the parametrization of its predictions."""

        preset: Literal["blobs"] = option(
            "blobs", "Built-in mixture; blobs: discs of 4 colors on the left or right of a gray image."
        )
        image_size: int = option(16, "Side of the images, in pixels.", ge=4, le=512)
        factor: int = option(
            1, "Side of the block of pixels averaged into one latent pixel; 1 means pixel space.", ge=1, le=16
        )
        std: float = option(0.1, "Standard deviation of every component; latents are in [-1, 1].", gt=0)
        parametrization: Literal["epsilon", "sample", "v_prediction", "flow"] = option(
            "epsilon",
            "Parametrization of predictions; flow uses the rectified-flow schedule, the others Stable Diffusion's.",
        )

        def validate(self) -> list[str]:
            """Check that the image size is a multiple of the block size."""
            return (
                [f"factor: {self.factor} does not divide image_size, which is {self.image_size}"]
                if self.image_size % self.factor
                else []
            )

    _means: Tensor
    _variances: Tensor
    _weights: Tensor

    def __init__(
        self, config: Config, *, mixture: Mixture | None = None, schedule: NoiseSchedule | None = None
    ) -> None:
        """Args:
        config: Preset and sizes; with ``mixture``, only ``factor`` and ``parametrization`` are used.
        mixture: Components that replace the preset.
        schedule: Schedule that replaces the default of the parametrization.
        """
        super().__init__()
        kind = "v_prediction" if config.parametrization == "flow" else config.parametrization
        if schedule is None:
            schedule = FlowSchedule() if config.parametrization == "flow" else VPSchedule.stable_diffusion(kind)
        self.schedule, self.factor = schedule, config.factor
        mixture = _blobs(config) if mixture is None else mixture
        self.image_size = mixture.means.shape[-1] * self.factor
        self._labels = mixture.labels
        self.vocabulary = vocabulary_of(word for words in mixture.labels for word in words)
        # The float64 tables are cast to the data type of the input, so float64 latents give float64 predictions.
        self.register_buffer("_means", mixture.means.double(), persistent=False)
        self.register_buffer("_variances", mixture.stds.double().square(), persistent=False)
        self.register_buffer("_weights", mixture.weights.double() / mixture.weights.sum(), persistent=False)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, height / factor, width / factor)."""
        return (self._means.shape[1], height // self.factor, width // self.factor)

    def encode(self, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """2 rgb - 1, averaged over blocks of pixels; deterministic, so ``generator`` is not used."""
        x = 2.0 * rgb.movedim(-1, 1) - 1.0
        if x.shape[-2:] != (self.image_size, self.image_size):
            x = functional.interpolate(x, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return x if self.factor == 1 else functional.avg_pool2d(x, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in which each latent pixel is a block of equal pixels."""
        x = latents.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return (0.5 * x + 0.5).movedim(1, -1)

    def embed(self, prompts: Sequence[str], cameras: Cameras | None = None) -> Conditioning:
        """The component weights of each prompt, as a (B, 1, K) text embedding; cameras are not used."""
        rows = torch.stack([self._component_weights(prompt) for prompt in prompts])
        return Conditioning(text=rows[:, None, :])

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """The exact prediction in the schedule's parametrization."""
        x0, eps = self._posterior_means(x_t, t, conditioning.text[:, 0].to(x_t.dtype))
        schedule, kind = self.schedule, self.schedule.prediction_type
        if kind == "v_prediction":
            output = schedule.velocity(x0, eps, t)
        else:
            output = eps if kind == "epsilon" else x0
        return Prediction(output, kind, x_t, t, schedule)

    def _posterior_means(self, x_t: Tensor, t: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t] for (B, K) component weights."""
        alpha, sigma = (c.to(x_t.dtype)[:, None, None, None, None] for c in self.schedule.coefficients(t))
        means, variances = self._means.to(x_t.dtype), self._variances.to(x_t.dtype).expand_as(self._means)
        residual = x_t[:, None] - alpha * means  # (B, K, C, h, w)
        spread = alpha.square() * variances + sigma.square()
        log_likelihood = -0.5 * (residual.square() / spread + spread.log()).flatten(2).sum(-1)
        responsibility = torch.softmax(weights.log() + log_likelihood, dim=-1)[:, :, None, None, None]
        whitened = residual / spread
        x0 = (responsibility * (means + alpha * variances * whitened)).sum(1)
        eps = sigma[:, 0] * (responsibility * whitened).sum(1)
        return x0, eps

    def _component_weights(self, prompt: str) -> Tensor:
        """Normalized weights (K,) of the components that match the prompt best."""
        prompt_words = set(words_of(prompt))
        matches = torch.tensor([len(prompt_words & words) for words in self._labels], device=self._weights.device)
        kept = self._weights * (matches == matches.max())
        return kept / kept.sum()


def _blobs(config: GaussianMixturePrior.Config) -> Mixture:
    """Discs of four colors at two positions, as latents of the configured size."""
    side = config.image_size
    center = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2.0 - 1.0
    means, labels = [], []
    for color, rgb in _BLOB_COLORS.items():
        for place, offset in _BLOB_PLACES.items():
            distance = ((center[None, :] - offset).square() + center[:, None].square()).sqrt()
            cover = ((0.45 - distance) * side / 2.0 + 0.5).clamp(0.0, 1.0)
            disc = torch.tensor(rgb, dtype=torch.float64)[:, None, None]
            means.append(2.0 * (cover * disc + (1.0 - cover) * 0.5) - 1.0)
            labels.append(frozenset({color, place, "blob"}))
    stacked = torch.stack(means)
    if config.factor > 1:
        stacked = functional.avg_pool2d(stacked, config.factor)
    stds = torch.full((len(labels), 1, 1, 1), config.std, dtype=torch.float64)
    return Mixture(stacked, stds, torch.ones(len(labels), dtype=torch.float64), tuple(labels))
