"""Noise schedules: the mixture of image and noise at each timestep, and the parametrizations of a network's output.

Every schedule describes x_t = alpha_t x_0 + sigma_t eps. Two families share one interface:

* :class:`VPSchedule`, the discrete variance-preserving chain of DDPM and Stable Diffusion: alpha^2 + sigma^2 = 1,
  velocity v = alpha eps - sigma x_0.
* :class:`FlowSchedule`, rectified flow (Stable Diffusion 3, Flux): alpha = 1 - s, sigma = s, velocity v = eps - x_0.

The timestep ``t`` is a float in [0, 1]; 1 is the noisiest one, and t * num_train_timesteps is the position on the
model's own schedule: timestep 500 of 1000 is t = 0.5. A negative ``t`` denotes the clean image (alpha 1, sigma 0),
which a VP chain reaches only after its last step: its timestep 0 still contains a little noise.

In both families v = a eps - b x_0 with a alpha + b sigma = 1. Therefore x_0 = a x_t - sigma v and
eps = b x_t + alpha v, without a division: velocity predictions can be converted where alpha is 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from scoredist3d.diffusion.betas import scheduler_betas, zero_terminal_snr

PredictionType = Literal["epsilon", "sample", "v_prediction"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction")

CLEAN = -1.0
"""Timestep of the clean image, below all timesteps of the model."""


def per_item(coefficient: Tensor, like: Tensor) -> Tensor:
    """A (B,) coefficient with shape (B, 1, 1, ...) and the data type of ``like``, to be multiplied with it."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class NoiseSchedule(ABC):
    """Coefficients, conversions and DDIM steps of one diffusion model.

    Methods take ``t`` as a (B,) floating-point tensor and return tensors of its data type and device, computed from
    float64 tables. No method synchronizes with a device.

    Attributes:
        prediction_type: Parametrization of the network's output: ``epsilon``, ``sample`` (x_0) or ``v_prediction``.
        num_train_timesteps: Number of timesteps that the model was trained on.
        final_timestep: Timestep that diffusers' negative DDIM timesteps correspond to: ``CLEAN`` with
            ``set_alpha_to_one``, otherwise the lowest one.
        steps_offset: Lowest integer timestep of diffusers' sampling grids, 1 for Stable Diffusion's own scheduler.
    """

    prediction_type: PredictionType
    num_train_timesteps: int
    final_timestep: float = CLEAN
    steps_offset: int = 0

    @staticmethod
    def from_config(config: Mapping[str, Any], *, image_tokens: int | None = None) -> NoiseSchedule:
        """The schedule that a diffusers ``scheduler_config.json`` describes.

        Args:
            config: Content of the file. A flow-matching scheduler is recognized by its class, by the prediction type
                ``flow_prediction`` of a solver, or by a ``shift`` without a ``beta_schedule``; any other scheduler is a
                VP chain.
            image_tokens: Number of image tokens of the transformer, required if the shift depends on the resolution.

        Raises:
            ValueError: Unknown beta schedule or prediction type, or ``image_tokens`` is missing.
        """
        solves_flow = config.get("prediction_type") == "flow_prediction"
        matches_flow = "FlowMatch" in str(config.get("_class_name", ""))
        if solves_flow or matches_flow or ("shift" in config and "beta_schedule" not in config):
            return FlowSchedule.from_scheduler_config(config, image_tokens=image_tokens)
        return VPSchedule.from_scheduler_config(config)

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at the quantized timestep, (B,) each; (1, 0) where t < 0."""

    @abstractmethod
    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of v = a eps - b x_0, (B,) each."""

    @abstractmethod
    def quantize(self, t: Tensor) -> Tensor:
        """The nearest timestep in [0, 1] that the model was trained on."""

    @abstractmethod
    def model_timestep(self, t: Tensor) -> Tensor:
        """The network's timestep input, (B,): integers for VP chains, floats for flows."""

    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the clean image in x_t, (B,)."""
        return self.coefficients(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise in x_t, (B,)."""
        return self.coefficients(t)[1]

    def lambda_(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha, (B,); increases with t and is infinite at zero SNR."""
        alpha, sigma = self.coefficients(t)
        return sigma / alpha

    def log_snr(self, t: Tensor) -> Tensor:
        """Logarithm of the signal-to-noise ratio, log(alpha^2 / sigma^2), (B,); decreases with t."""
        alpha, sigma = self.coefficients(t)
        return 2.0 * (alpha.log() - sigma.log())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noisy image x_t = alpha_t x_0 + sigma_t eps, (B, C, h, w)."""
        alpha, sigma = self.coefficients(t)
        return per_item(alpha, x0) * x0 + per_item(sigma, x0) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The velocity v = a eps - b x_0 of a given image and noise, in this family's convention."""
        a, b = (per_item(c, x0) for c in self.velocity_coefficients(t))
        return a * eps - b * x0

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType | None = None) -> Tensor:
        """The clean image from an output of parametrization ``kind`` (default: the network's own) at (x_t, t)."""
        kind = kind or self.prediction_type
        alpha, sigma = (per_item(c, x_t) for c in self.coefficients(t))
        if kind == "sample":
            return output
        if kind == "epsilon":
            return (x_t - sigma * output) / alpha
        return per_item(self.velocity_coefficients(t)[0], x_t) * x_t - sigma * output

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType | None = None) -> Tensor:
        """The noise from an output of parametrization ``kind`` (default: the network's own) at (x_t, t)."""
        kind = kind or self.prediction_type
        alpha, sigma = (per_item(c, x_t) for c in self.coefficients(t))
        if kind == "epsilon":
            return output
        if kind == "sample":
            return (x_t - alpha * output) / sigma
        return per_item(self.velocity_coefficients(t)[1], x_t) * x_t + alpha * output

    def to_v(self, output: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType | None = None) -> Tensor:
        """The velocity from an output of parametrization ``kind`` (default: the network's own) at (x_t, t)."""
        kind = kind or self.prediction_type
        if kind == "v_prediction":
            return output
        alpha, sigma = (per_item(c, x_t) for c in self.coefficients(t))
        a, b = (per_item(c, x_t) for c in self.velocity_coefficients(t))
        if kind == "epsilon":
            return (output - b * x_t) / alpha
        return (a * x_t - output) / sigma

    def ddim_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Variance of the ancestral step t -> s (s < t), sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2).

        On any schedule, it is the variance of x_s given x_t and x_0 if x_t is a multiple of x_s plus independent noise.
        On variance-preserving chains, it is eq. 16 of DDIM with eta 1. It never exceeds sigma_s^2.
        """
        alpha_t, sigma_t = self.coefficients(t)
        alpha_s, sigma_s = self.coefficients(s)
        kept = alpha_t * sigma_s / (alpha_s * sigma_t)
        return sigma_s.square() * (1.0 - kept.square())

    def ddim_step(
        self, eps: Tensor, x0: Tensor, t: Tensor, s: Tensor, *, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """The state at timestep ``s`` after a DDIM step from ``t`` (arXiv 2010.02502, eq. 12).

        x_s = alpha_s x_0 + sqrt(sigma_s^2 - eta^2 var) eps + eta sqrt(var) noise. With eta 0 this is the Euler step of
        the probability-flow ODE in lambda and of a rectified flow, and is valid in both directions (s > t inverts).

        Args:
            eps: (B, C, h, w), the predicted noise at ``t``.
            x0: (B, C, h, w), the predicted clean image at ``t``.
            t: (B,), the current timesteps.
            s: (B,), the new timesteps.
            eta: Amount of new noise in [0, 1].
            noise: (B, C, h, w), standard normal; required if ``eta`` is not 0.

        Raises:
            ValueError: ``eta`` is not 0 and no noise is given.
        """
        alpha, sigma = self.coefficients(s)
        if eta == 0.0:
            return per_item(alpha, x0) * x0 + per_item(sigma, eps) * eps
        if noise is None:
            raise ValueError(f"a DDIM step with eta={eta} requires the argument noise")
        variance = eta**2 * self.ddim_variance(t, s)
        direction = (sigma.square() - variance).clamp_min(0.0).sqrt()
        return per_item(alpha, x0) * x0 + per_item(direction, eps) * eps + per_item(variance.sqrt(), noise) * noise

    def timesteps(self, steps: int, start: float = 1.0, *, end: float = CLEAN) -> list[float]:
        """``steps`` decreasing timesteps that begin at ``start``, followed by ``end``.

        The spacing is "trailing" in diffusers' terminology: sampling begins at the noisiest timestep.

        Raises:
            ValueError: ``steps`` is not positive.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        low = max(end, 0.0)
        return [*(start + (low - start) * k / steps for k in range(steps)), end]


class VPSchedule(NoiseSchedule):
    """Discrete variance-preserving chain: alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)."""

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: PredictionType = "epsilon",
        *,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
    ) -> None:
        """Args:
        alphas_cumprod: (N,), abar of each training timestep, decreasing, in [0, 1].
        prediction_type: Parametrization of the network's output.
        set_alpha_to_one: Option of diffusers' DDIM schedulers; see :attr:`NoiseSchedule.final_timestep`.
        steps_offset: See :class:`NoiseSchedule`.

        Raises:
            ValueError: Unknown prediction type, or values outside of [0, 1].
        """
        _check_prediction_type(prediction_type)
        abar = alphas_cumprod.detach().double().cpu()
        if abar.ndim != 1 or not bool(((abar >= 0) & (abar <= 1)).all()):
            raise ValueError("alphas_cumprod must be a vector of values in [0, 1]")
        self.prediction_type = prediction_type
        self.num_train_timesteps = len(abar)
        self.final_timestep = CLEAN if set_alpha_to_one else 0.0
        self.steps_offset = steps_offset
        # Entry 0 is the clean image, entry 1 + k is timestep k.
        abar = torch.cat([abar.new_ones(1), abar])
        self._table = torch.stack([abar.sqrt(), (1.0 - abar).sqrt()])
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def stable_diffusion(cls, prediction_type: PredictionType = "epsilon") -> VPSchedule:
        """The schedule of Stable Diffusion 1 and 2: 1000 steps, sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012)."""
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        return cls.from_scheduler_config({**betas, "prediction_type": prediction_type, "set_alpha_to_one": False})

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> VPSchedule:
        """The schedule of a diffusers DDPM, DDIM, PNDM, Euler, ... scheduler configuration.

        ``set_alpha_to_one`` counts as true unless the configuration sets it explicitly: a value that is only the
        default of the scheduler class is ignored, as when diffusers builds a DDIM scheduler from the same
        configuration.
        """
        betas = scheduler_betas(config)
        abar = torch.cumprod(1.0 - betas, dim=0)
        if config.get("rescale_betas_zero_snr", False):
            abar = zero_terminal_snr(abar)
        # The configuration of a loaded scheduler lists the options that have default values.
        is_given = "set_alpha_to_one" not in config.get("_use_default_values", ())
        to_one = bool(config.get("set_alpha_to_one", True)) if is_given else True
        # diffusers applies the offset to "leading" grids only, which are the default.
        offset = config.get("steps_offset", 0) if config.get("timestep_spacing", "leading") == "leading" else 0
        prediction = config.get("prediction_type", "epsilon")
        return cls(abar, prediction, set_alpha_to_one=to_one, steps_offset=offset)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) from the table at the nearest timestep, (B,) each; (1, 0) where t < 0."""
        key = (t.device, t.dtype)
        if key not in self._on_device:
            self._on_device[key] = self._table.to(dtype=t.dtype).to(t.device)
        index = (t * self.num_train_timesteps).round().clamp(0, self.num_train_timesteps - 1).long() + 1
        alpha, sigma = self._on_device[key][:, torch.where(t < 0, 0, index)]
        return alpha, sigma

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of v = alpha eps - sigma x_0, (B,) each."""
        return self.coefficients(t)

    def quantize(self, t: Tensor) -> Tensor:
        """The nearest k / N with k in 0..N-1."""
        return self.model_timestep(t).clamp_min(0).to(t.dtype) / self.num_train_timesteps

    def model_timestep(self, t: Tensor) -> Tensor:
        """The nearest integer k in 0..N-1; 0 for ``CLEAN``.

        A ``t`` between ``CLEAN`` and 0 gives a negative integer, which no model was trained on. It exists to reproduce
        published code that uses such timesteps.
        """
        index = (t * self.num_train_timesteps).round().clamp_max(self.num_train_timesteps - 1)
        return torch.where(t <= CLEAN, 0, index).long()

    def timesteps(self, steps: int, start: float = 1.0, *, end: float = CLEAN) -> list[float]:
        """Trailing timesteps as in the base class; by default round(N - k N / steps) - 1, as in diffusers."""
        n = self.num_train_timesteps
        top = min(round(start * n), n - 1)
        span = top + 1 - max(round(end * n), 0)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return [*(max(round(top + 1 - k * span / steps - 1), 0) / n for k in range(steps)), end]


class FlowSchedule(NoiseSchedule):
    """Rectified flow x_s = (1 - s) x_0 + s eps with the timestep shift of the model's sampler.

    ``t`` is the position on the unshifted schedule and s = shift t / (1 + (shift - 1) t) (arXiv 2403.03206, eq. 23).
    Equal steps in t correspond to the steps of the model's own sampler. The network's timestep input is
    s * num_train_timesteps.
    """

    def __init__(
        self, shift: float = 1.0, num_train_timesteps: int = 1000, prediction_type: PredictionType = "v_prediction"
    ) -> None:
        """Args:
        shift: Timestep shift; 1 for none, 3 for Stable Diffusion 3.
        num_train_timesteps: Scale of the network's timestep input.
        prediction_type: Parametrization of the network's output; flow models predict the velocity.

        Raises:
            ValueError: The shift is not positive, or the prediction type is unknown.
        """
        _check_prediction_type(prediction_type)
        if not shift > 0:
            raise ValueError(f"the shift of a flow schedule must be positive, got {shift}")
        self.shift = float(shift)
        self.num_train_timesteps = int(num_train_timesteps)
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], *, image_tokens: int | None = None) -> FlowSchedule:
        """The schedule of a diffusers flow-matching scheduler configuration.

        Raises:
            ValueError: The shift depends on the resolution and ``image_tokens`` is not given.
        """
        shift = float(config.get("shift", config.get("flow_shift", 1.0)))  # the latter is that of a solver
        if config.get("use_dynamic_shifting", False):
            if image_tokens is None:
                raise ValueError(
                    "the shift of this flow schedule depends on the resolution; pass image_tokens, the number of image "
                    "tokens of the transformer"
                )
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            mu = base + (top - base) * (image_tokens - low) / (high - low)
            shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
        return cls(shift, int(config.get("num_train_timesteps", 1000)))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - s, s) with s = shift t / (1 + (shift - 1) t), (B,) each."""
        u = t.clamp(0.0, 1.0)
        denominator = 1.0 + (self.shift - 1.0) * u
        return (1.0 - u) / denominator, self.shift * u / denominator

    def velocity_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 1) of v = eps - x_0, (B,) each."""
        one = torch.ones_like(t)
        return one, one

    def quantize(self, t: Tensor) -> Tensor:
        """The nearest k / N with k in 1..N."""
        return (t * self.num_train_timesteps).round().clamp(1, self.num_train_timesteps) / self.num_train_timesteps

    def model_timestep(self, t: Tensor) -> Tensor:
        """s * num_train_timesteps, not rounded."""
        return self.sigma(t) * self.num_train_timesteps


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
