"""Trainable parameters of a variable number of 3D Gaussians."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.geometry.base import GaussianCloud, GaussianSet
from scoredist3d.geometry.gaussians.optimizer_state import replace_values

_MIN_OPACITY = 1e-6  # keeps logits finite


class GaussianParameters(GaussianCloud):
    """Parameters and gradient statistics of N Gaussians; N can change.

    Attributes:
        means: (N, 3), world.
        log_scales: (N, 3), logarithms of the standard deviations in scene units.
        quaternions: (N, 4), w first, not necessarily normalized.
        opacity_logits: (N,).
        features: (N, F), input of the material.
        gradient_sum: (N,), sum of the screen-space gradient norms since the last densification.
        views_seen: (N,), number of views in that sum.
    """

    gradient_sum: Tensor
    views_seen: Tensor

    def __init__(self, config: GaussianCloud.Config, num_features: int) -> None:
        super().__init__(config)
        self.num_features = num_features
        self.means = nn.Parameter(torch.empty(0, 3))
        self.log_scales = nn.Parameter(torch.empty(0, 3))
        self.quaternions = nn.Parameter(torch.empty(0, 4))
        self.opacity_logits = nn.Parameter(torch.empty(0))
        self.features = nn.Parameter(torch.empty(0, num_features))
        self.register_buffer("gradient_sum", torch.empty(0))
        self.register_buffer("views_seen", torch.empty(0))

    def __len__(self) -> int:
        """The number of Gaussians."""
        return len(self.means)

    def forward(self) -> GaussianSet:
        """The Gaussians, differentiable in the parameters."""
        return GaussianSet(
            self.means, self.log_scales.exp(), self.quaternions, self.opacity_logits.sigmoid(), self.features
        )

    def assign(self, gaussians: GaussianSet) -> None:
        """Replace all Gaussians, possibly with a different number of them, and clear the statistics."""
        opacities = gaussians.opacities.clamp(_MIN_OPACITY, 1 - _MIN_OPACITY)
        self._put("means", gaussians.means)
        self._put("log_scales", gaussians.scales.log())
        self._put("quaternions", gaussians.quaternions)
        self._put("opacity_logits", torch.logit(opacities))
        self._put("features", gaussians.features)
        self.clear_statistics()

    def clear_statistics(self) -> None:
        """Set the gradient statistics of the current N Gaussians to zero."""
        for name in ("gradient_sum", "views_seen"):
            self._put(name, torch.zeros_like(self.opacity_logits))

    def prepare_loading(self, state: Mapping[str, Tensor]) -> None:
        """Set N to the number of Gaussians in ``state``, provided that all other sizes agree."""
        own = {name: value for name, value in self.state_dict().items() if name in state}
        count = len(state["means"]) if "means" in own and state["means"].ndim == 2 else len(self)
        if count == len(self) or any(state[name].shape != (count, *value.shape[1:]) for name, value in own.items()):
            return
        for name in own:
            self._put(name, state[name].to(own[name]))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups ``means``, ``scales``, ``quaternions``, ``opacities`` and ``features``."""
        groups = {
            "means": self.means,
            "scales": self.log_scales,
            "quaternions": self.quaternions,
            "opacities": self.opacity_logits,
            "features": self.features,
        }
        return [{"name": name, "params": [parameter]} for name, parameter in groups.items()]

    def _put(self, name: str, values: Tensor) -> None:
        """Set a parameter or buffer to a copy of ``values``, possibly with a different length."""
        parameter = self._parameters.get(name)
        if parameter is None:
            setattr(self, name, values.detach().clone())
        else:
            replace_values(parameter, values.detach().clone())
