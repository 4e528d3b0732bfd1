"""The shape that signed distances begin with: a sphere, an ellipsoid or a mesh file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scoredist3d.config import ComponentConfig, option
from scoredist3d.meshes.loading import fit_into, load_mesh
from scoredist3d.meshes.mesh import Mesh

# An ellipsoid's formula divides zero by zero in its centre; this many radii away it is left alone.
_CENTRE = 1e-6


@dataclass
class ShapeStartConfig(ComponentConfig):
    """Options of the shape to begin with, to be mixed into a geometry's."""

    shape_init: Literal["sphere", "ellipsoid", "mesh"] = option(
        "sphere", "What the object starts as, unless the run starts from another one."
    )
    shape_init_size: float = option(
        0.5,
        "Radius of the sphere, or how far the mesh reaches from the origin; fraction of the ball's radius.",
        gt=0,
        le=1,
    )
    shape_init_axes: tuple[float, float, float] = option(
        (0.5, 0.5, 0.5),
        "Half axes of the ellipsoid along x, y and z, as fractions of the ball's radius.",
        gt=0,
        le=1,
    )
    shape_init_mesh: str | None = option(
        None, "Mesh file (.glb, .obj, .ply, .stl) of shape_init: mesh, scaled to shape_init_size.", file=True
    )

    def validate(self) -> list[str]:
        """A file where one is needed, and only there."""
        problems = super().validate()
        if self.shape_init == "mesh" and not self.shape_init_mesh:
            problems.append("shape_init_mesh: shape_init is mesh, but no file is given; name one, e.g. chair.obj")
        if self.shape_init != "mesh" and self.shape_init_mesh:
            problems.append(
                f"shape_init_mesh: {self.shape_init_mesh} would not be used with shape_init: {self.shape_init}; "
                "set shape_init: mesh"
            )
        return problems

    def start_mesh(self, radius: float) -> Mesh | None:
        """The file's mesh, scaled to reach ``shape_init_size * radius``; None for the other shapes.

        Raises:
            ValueError: The file cannot be read, or has no extent.
        """
        if self.shape_init != "mesh":
            return None
        assert self.shape_init_mesh is not None
        return fit_into(load_mesh(self.shape_init_mesh).mesh, self.shape_init_size * radius, margin=1.0)

    def start_distance(self, points: Tensor, radius: float) -> Tensor:
        """(N,) signed distances at (N, 3) to the ellipsoid, or else to the sphere; scene units, differentiable."""
        if self.shape_init == "ellipsoid":
            a, b, c = (radius * axis for axis in self.shape_init_axes)
            return ellipsoid_sdf(points, (a, b, c))
        return points.norm(dim=-1) - self.shape_init_size * radius


def ellipsoid_sdf(points: Tensor, axes: tuple[float, float, float]) -> Tensor:
    """(N,) distances at (N, 3) to the ellipsoid with half ``axes``, to first order near it; exact for a sphere.

    With k = |p / a| the function (k - 1) k / |p / a^2| has the right zeros and there a gradient of length 1. Around the
    centre, where that is 0 / 0, it is smoothed over a millionth of an axis, so that it can be differentiated anywhere.
    """
    scale = points.new_tensor(axes)
    level = ((points / scale).square().sum(-1) + _CENTRE**2).sqrt()
    slope = ((points / scale.square()).square().sum(-1) + (_CENTRE / min(axes)) ** 2).sqrt()
    return level * (level - 1.0) / slope
