"""Initial shape of signed distance geometries: a sphere, an ellipsoid or a mesh file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scoredist3d.config import ComponentConfig, option
from scoredist3d.meshes.loading import fit_into, load_mesh
from scoredist3d.meshes.mesh import Mesh

# The distance formula of an ellipsoid is 0 / 0 at the center; it is smoothed over this fraction of an axis.
_CENTER = 1e-6


@dataclass
class SDFInitConfig(ComponentConfig):
    """Options of the initial shape; a mixin for the configs of geometries."""

    shape_init: Literal["sphere", "ellipsoid", "mesh"] = option(
        "sphere", "Initial shape, unless the run starts from another object (system.init_from)."
    )
    shape_init_size: float = option(
        0.5,
        "Radius of the initial sphere, or maximum distance of the mesh from the origin, as a fraction of "
        "geometry.radius.",
        gt=0,
        le=1,
    )
    shape_init_axes: tuple[float, float, float] = option(
        (0.5, 0.5, 0.5),
        "Semi-axes of the initial ellipsoid along x, y and z, as fractions of geometry.radius.",
        gt=0,
        le=1,
    )
    shape_init_mesh: str | None = option(
        None, "Mesh file (.glb, .obj, .ply, .stl) for shape_init: mesh, scaled to shape_init_size.", file=True
    )

    def validate(self) -> list[str]:
        """Require a mesh file for ``shape_init: mesh``, and only for it."""
        problems = super().validate()
        if self.shape_init == "mesh" and not self.shape_init_mesh:
            problems.append("shape_init_mesh: shape_init: mesh needs a mesh file; set it, e.g. to chair.obj")
        if self.shape_init != "mesh" and self.shape_init_mesh:
            problems.append(
                f"shape_init_mesh: {self.shape_init_mesh} is not used with shape_init: {self.shape_init}; set "
                "shape_init: mesh, or remove shape_init_mesh"
            )
        return problems

    def initial_mesh(self, radius: float) -> Mesh | None:
        """The mesh of the file, scaled to reach ``shape_init_size * radius`` from the origin; None for other shapes.

        Raises:
            ValueError: The file cannot be read, or all vertices of its mesh coincide.
        """
        if self.shape_init != "mesh":
            return None
        assert self.shape_init_mesh is not None
        return fit_into(load_mesh(self.shape_init_mesh).mesh, self.shape_init_size * radius, margin=1.0)

    def initial_distance(self, points: Tensor, radius: float) -> Tensor:
        """(N,) signed distances from (N, 3) points to the ellipsoid or sphere, scene units; differentiable."""
        if self.shape_init == "ellipsoid":
            a, b, c = (radius * axis for axis in self.shape_init_axes)
            return ellipsoid_sdf(points, (a, b, c))
        return points.norm(dim=-1) - self.shape_init_size * radius


def ellipsoid_sdf(points: Tensor, axes: tuple[float, float, float]) -> Tensor:
    """(N,) approximate signed distances from (N, 3) points to an ellipsoid with semi-axes ``axes``; exact for a sphere.

    With k = |p / a|, the function (k - 1) k / |p / a^2| is zero on the ellipsoid and has a gradient of length 1 there,
    so it equals the distance to first order. It is smoothed around the center, where it is 0 / 0, so that it is
    differentiable everywhere.
    """
    scale = points.new_tensor(axes)
    level = ((points / scale).square().sum(-1) + _CENTER**2).sqrt()
    slope = ((points / scale.square()).square().sum(-1) + (_CENTER / min(axes)) ** 2).sqrt()
    return level * (level - 1.0) / slope
