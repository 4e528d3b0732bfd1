"""Base class for fields that use a multiresolution hash grid and a small network (Instant-NGP, arXiv 2201.05989)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.config import option
from scoredist3d.geometry.base import Field, GeometryOutput
from scoredist3d.limits import MAX_FEATURES
from scoredist3d.materials.base import Material
from scoredist3d.nn.hash_network import FREE_OPTIONS, HashGridConfig, HashNetwork, NetworkConfig, grid_problems
from scoredist3d.seeding import Rng

_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, 1.0))


class HashField(HashNetwork, Field):
    """A field of scalar values and features, computed by a network from the hash encoding of each point.

    Subclasses map the network's first output to the value (:meth:`_value`) and the value to a density
    (:meth:`_output`). Normals are the normalized gradient of the value, times ``outward_sign``.

    Attributes:
        outward_sign: 1 if the value increases outwards, -1 if it increases inwards.
    """

    free_options = FREE_OPTIONS | {
        "normal",
        "finite_difference_step",
    }

    @dataclass
    class Config(Field.Config):
        """Options shared by all hash-grid fields."""

        num_features: int | None = option(
            None, "Number of feature channels; null uses the number that the material requires.", ge=1, le=MAX_FEATURES
        )
        grid: HashGridConfig = field(default_factory=HashGridConfig, metadata={"help": "Hash grid."})
        network: NetworkConfig = field(default_factory=NetworkConfig, metadata={"help": "Network after the hash grid."})
        normal: Literal["analytic", "finite-difference"] = option(
            "analytic", "How normals are computed; finite differences give smoother normals but cost more."
        )
        finite_difference_step: float = option(
            0.01, "Distance of the finite-difference samples from the point, as a fraction of the radius.", gt=0
        )

        def validate(self) -> list[str]:
            """Check relations between the options of the grid."""
            return super().validate() + grid_problems(self.grid)

    outward_sign: float

    def __init__(self, config: Config, *, rng: Rng | None = None, material: Material | None = None) -> None:
        super().__init__(config)
        self.config = config
        self.num_features = config.num_features or (3 if material is None else material.num_features)
        generator = (rng or Rng()).shared()("geometry")
        self._build(config.grid, config.network, 1 + self.num_features, self.radius, generator)

    @abstractmethod
    def _value(self, raw: Tensor, points: Tensor, distance: Tensor) -> Tensor:
        """(N,) values from the first outputs ``raw`` (N,) at (N, 3) points; ``distance`` (N,) is |x| / radius."""

    @abstractmethod
    def _output(self, value: Tensor, features: Tensor, gradient: Tensor | None, distance: Tensor) -> GeometryOutput:
        """The output for values (N,) and, if normals were requested, their gradients (N, 3)."""

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """Values of the field at (N, 3) world points; differentiable in the parameters and the points."""
        if with_normal and self.config.normal == "analytic":
            return self._with_analytic_normal(points)
        distance = points.norm(dim=-1) / self.radius
        value, features = self._evaluate(points, distance)
        gradient = self._finite_difference_gradient(points) if with_normal else None
        return self._output(value, features, gradient, distance)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups ``encoding`` (the hash table) and ``network``."""
        return [
            {"name": "encoding", "params": [self.table]},
            {"name": "network", "params": list(self.network.parameters())},
        ]

    def _evaluate(
        self, points: Tensor, distance: Tensor, *, twice_differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Values (N,) and features (N, F) at (N, 3) points."""
        outputs = self._raw(points, twice_differentiable=twice_differentiable)
        raw, features = outputs.split([1, self.num_features], dim=-1)
        return self._value(raw[:, 0], points, distance), features

    def _value_at(self, points: Tensor, distance: Tensor, *, twice_differentiable: bool = False) -> Tensor:
        """(N,) values at (N, 3) points, without the features."""
        raw = self._raw(points, num_outputs=1, twice_differentiable=twice_differentiable)
        return self._value(raw[:, 0], points, distance)

    def _with_analytic_normal(self, points: Tensor) -> GeometryOutput:
        """The output with normals from the analytic gradient of the value."""
        build_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_()
            distance = points.norm(dim=-1) / self.radius
            value, features = self._evaluate(points, distance, twice_differentiable=True)
            (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=build_graph, retain_graph=True)
        if not build_graph:
            value, features, distance = value.detach(), features.detach(), distance.detach()
        return self._output(value, features, gradient, distance)

    def _analytic_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) analytic gradients of the value at (N, 3) points."""
        build_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_()
            value = self._value_at(points, points.norm(dim=-1) / self.radius, twice_differentiable=True)
            (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=build_graph)
        return gradient

    def _finite_difference_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) gradients from four samples at the corners k of a tetrahedron: sum_k k v(x + h k) / (4 h)."""
        corners = points.new_tensor(_TETRAHEDRON)
        step = self.config.finite_difference_step * self.radius / math.sqrt(3.0)
        shifted = (points[None] + step * corners[:, None]).reshape(-1, 3)
        value = self._value_at(shifted, shifted.norm(dim=-1) / self.radius).view(4, -1)
        # Not a matrix product: autocast would compute these differences of nearly equal numbers in half precision.
        return (corners[:, None] * value[..., None]).sum(0) / (4.0 * step)

    def _outward(self, gradient: Tensor | None) -> Tensor | None:
        """(N, 3) outward unit normals, 0 where the gradient vanishes; None without a gradient."""
        if gradient is None:
            return None
        return F.normalize(self.outward_sign * gradient, dim=-1, eps=1e-8)
