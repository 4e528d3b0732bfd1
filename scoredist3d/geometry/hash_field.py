"""What fields of a multiresolution hash grid and a small network share (Instant-NGP, arXiv 2201.05989)."""

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
from scoredist3d.materials.base import Material
from scoredist3d.nn.hash_network import FREE_OPTIONS, HashGridConfig, HashNetwork, NetworkConfig, grid_problems
from scoredist3d.seeding import Rng

_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, 1.0))


class HashField(HashNetwork, Field):
    """Value and features of points: the outputs of a network on the hash encoding of the point.

    The first output f is combined with something known, :meth:`_value`; the value's gradient is the normal, up to
    ``outward_sign``. What the value means is said by the kinds of field, in :meth:`_output`.

    Attributes:
        outward_sign: 1 where the value grows outwards, -1 where it grows inwards.
    """

    free_options = FREE_OPTIONS | {
        "normal",
        "finite_difference_step",
    }

    @dataclass
    class Config(Field.Config):
        """Options of every hash-grid field."""

        num_features: int | None = option(
            None, "Feature channels handed to the material; as many as it takes where not given.", ge=1
        )
        grid: HashGridConfig = field(default_factory=HashGridConfig, metadata={"help": "The encoding."})
        network: NetworkConfig = field(default_factory=NetworkConfig, metadata={"help": "The network after it."})
        normal: Literal["analytic", "finite-difference"] = option(
            "analytic", "How normals are computed; finite differences look further and so are smoother, but cost more."
        )
        finite_difference_step: float = option(
            0.01, "Offset of the finite-difference samples, as a fraction of the radius.", gt=0
        )

        def validate(self) -> list[str]:
            """Relations between grid options."""
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
        """(N,) the value, from f = ``raw`` (N,) and what is known at ``points`` (N, 3), |x| / radius away."""

    @abstractmethod
    def _output(self, value: Tensor, features: Tensor, gradient: Tensor | None, distance: Tensor) -> GeometryOutput:
        """What renderers take, from the values (N,) and, where normals are asked for, their gradients (N, 3)."""

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        """The field at (N, 3) world points; differentiable in the parameters, and in the points where they need it."""
        if with_normal and self.config.normal == "analytic":
            return self._with_analytic_normal(points)
        distance = points.norm(dim=-1) / self.radius
        value, features = self._evaluate(points, distance)
        gradient = self._finite_difference_gradient(points) if with_normal else None
        return self._output(value, features, gradient, distance)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The hash table (``encoding``) and the network's weights (``network``)."""
        return [
            {"name": "encoding", "params": [self.table]},
            {"name": "network", "params": list(self.network.parameters())},
        ]

    def _evaluate(
        self, points: Tensor, distance: Tensor, *, twice_differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Values (N,) and features (N, F)."""
        outputs = self._raw(points, twice_differentiable=twice_differentiable)
        raw, features = outputs.split([1, self.num_features], dim=-1)
        return self._value(raw[:, 0], points, distance), features

    def _value_at(self, points: Tensor, distance: Tensor, *, twice_differentiable: bool = False) -> Tensor:
        """Values (N,) alone."""
        raw = self._raw(points, num_outputs=1, twice_differentiable=twice_differentiable)
        return self._value(raw[:, 0], points, distance)

    def _with_analytic_normal(self, points: Tensor) -> GeometryOutput:
        """The normal is the gradient's direction; a density grows with its value, so that this serves there too."""
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
        """(N, 3) gradients of the value."""
        build_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points if points.requires_grad else points.detach().requires_grad_()
            value = self._value_at(points, points.norm(dim=-1) / self.radius, twice_differentiable=True)
            (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=build_graph)
        return gradient

    def _finite_difference_gradient(self, points: Tensor) -> Tensor:
        """(N, 3) from four samples at the corners k of a tetrahedron: grad v ~ sum_k k v(x + h k) / (4 h)."""
        corners = points.new_tensor(_TETRAHEDRON)
        step = self.config.finite_difference_step * self.radius / math.sqrt(3.0)
        shifted = (points[None] + step * corners[:, None]).reshape(-1, 3)
        value = self._value_at(shifted, shifted.norm(dim=-1) / self.radius).view(4, -1)
        # No product of matrices: autocast would round these differences of nearly equal numbers.
        return (corners[:, None] * value[..., None]).sum(0) / (4.0 * step)

    def _outward(self, gradient: Tensor | None) -> Tensor | None:
        """Unit normals, and zero where the field is flat; None of None."""
        if gradient is None:
            return None
        return F.normalize(self.outward_sign * gradient, dim=-1, eps=1e-8)
