"""Replacement of colors where no training camera sees the surface by colors diffused from where it is seen.

Optimization never compares these parts, such as undersides, with the prior. Their colors are what the field happens to
have there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scoredist3d.cameras import Cameras
from scoredist3d.export.visibility import exposure, relative_exposure
from scoredist3d.meshes.lattice import Lattice, diffuse, subdivide
from scoredist3d.meshes.mesh import Mesh

_EDGE = 0.05  # longest edge of the lattice, relative to the radius of the mesh around its center
# Exposures between which the values change from the diffused ones to the object's own, and from which the object's own
# are diffused. On a mug seen from -10 to 60 degrees of elevation, the walls have 0.2, the inside has 0.08 or more, and
# the rounded edge of the underside, whose color is already wrong, has 0.02 to 0.07.
_UNSEEN, _SEEN, _CLEAR = 0.02, 0.07, 0.12
# Wide parts that are rarely seen, such as the underside of a mushroom's cap, keep their own colors, smoothed over this
# length relative to the radius of the mesh; from the exposure below on, the smoothing is not stronger.
_SMOOTHING, _RARE = 0.08, 0.01
_MOST_SAMPLES = 400_000  # samples from which the values of the nodes are computed


@dataclass(frozen=True)
class SeenSurface:
    """The surface of a mesh with the confidence in the object's own colors.

    Attributes:
        lattice: Subdivision of the mesh.
        exposure: (T, 3) float32, exposure of each corner of the lattice, as :func:`exposure` returns it, but
            scaled so that well seen parts have about 0.2.
        length: Length over which the colors of rarely seen parts are smoothed, scene units.
    """

    lattice: Lattice
    exposure: np.ndarray
    length: float

    @property
    def confidence(self) -> np.ndarray:
        """(T, 3) float32 in [0, 1], confidence in the object's own colors at each corner of the lattice.

        It is 1 where the cameras see the surface well enough, and 0 where they hardly see it.
        """
        ramp = ((self.exposure - _UNSEEN) / (_SEEN - _UNSEEN)).clip(0.0, 1.0)
        return ramp * ramp * (3.0 - 2.0 * ramp)

    @property
    def best(self) -> np.ndarray:
        """(N,) float32, exposure of each node of the lattice: the largest one of its corners."""
        found = np.zeros(len(self.lattice.nodes), dtype=np.float32)
        np.maximum.at(found, self.lattice.triangles.ravel(), self.exposure.ravel())
        return found

    def at(self, face: np.ndarray, barycentric: np.ndarray) -> SurfaceSamples:
        """Points of the surface, given by their faces (M,) and the weights (M, 3) of the corners of those faces."""
        triangle, weights = self.lattice.locate(face, barycentric)
        corners = self.confidence[triangle]
        confidence = np.einsum("mk,mk->m", weights, corners).clip(0.0, 1.0)
        # Rounding errors must not change the colors of seen parts.
        confidence[corners.min(axis=1) == 1.0] = 1.0
        return SurfaceSamples(self, triangle, weights, confidence)

    def at_vertices(self, mesh: Mesh) -> SurfaceSamples:
        """The vertices (V) of the subdivided mesh, each as a corner of the last of its faces; all vertices are used."""
        face, corner = np.zeros((2, len(mesh.vertices)), dtype=np.int64)
        for number in range(3):
            face[mesh.faces[:, number]] = np.arange(len(mesh.faces))
            corner[mesh.faces[:, number]] = number
        return self.at(face, np.eye(3, dtype=np.float32)[corner])


@dataclass(frozen=True)
class SurfaceSamples:
    """``M`` points of a surface.

    Attributes:
        surface: The surface.
        triangle: (M,) int64, triangles of the lattice.
        weights: (M, 3) float32, weights of the corners of those triangles.
        confidence: (M,) float32 in [0, 1], confidence in the object's own colors.
    """

    surface: SeenSurface
    triangle: np.ndarray
    weights: np.ndarray
    confidence: np.ndarray

    @property
    def filled_share(self) -> float:
        """Share, in [0, 1], of the samples whose own values have less than half of the weight."""
        return float((self.confidence < 0.5).mean()) if len(self.confidence) else 0.0

    def fill(self, values: np.ndarray) -> np.ndarray:
        """(M, C) float32 values in which those of unseen samples are replaced; the others are exactly as given."""
        changed = np.flatnonzero(self.confidence < 1.0)
        own, known = self._at_nodes(values)
        best = self.surface.best
        fixed = known & (best >= _CLEAR)
        if not len(changed) or not fixed.any():
            return values
        pull = np.where(known, (best / _RARE).clip(0.0, 1.0), 0.0) / self.surface.length**2
        nodes = diffuse(self.surface.lattice, fixed, own, pull)
        corners = self.surface.lattice.triangles[self.triangle[changed]]
        diffused = np.einsum("mk,mkc->mc", self.weights[changed], nodes[corners])
        share = self.confidence[changed, None]
        result = values.copy()
        result[changed] = share * values[changed] + (1.0 - share) * diffused
        return result

    def _at_nodes(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means (N, C) of the samples around each node, weighted by their squared exposure, and where there are any."""
        lattice = self.surface.lattice
        some = slice(None, None, max(1, len(self.triangle) // _MOST_SAMPLES))
        corners, size = lattice.triangles[self.triangle[some]].ravel(), len(lattice.nodes)
        exposed = np.einsum("mk,mk->m", self.weights[some], self.surface.exposure[self.triangle[some]])
        weights = (self.weights[some] * exposed[:, None] ** 2).ravel()
        total = np.bincount(corners, weights, size)
        columns = [np.bincount(corners, weights * np.repeat(column, 3), size) for column in values[some].T]
        return np.stack(columns, axis=1) / np.maximum(total, 1e-12)[:, None], total > 1e-9


def seen_surface(mesh: Mesh, cameras: Cameras, *, both_sides: bool = False) -> SeenSurface | None:
    """The surface of a mesh as the training cameras see it; None if they see no part of it.

    Args:
        mesh: The mesh.
        cameras: Training cameras, spread over their whole range.
        both_sides: Whether views from behind a face count too, as for an open surface.
    """
    low, high = mesh.bounds
    radius = max(0.5 * float(np.linalg.norm(high - low)), 1e-12)
    lattice = subdivide(mesh, _EDGE * radius)
    found = exposure(mesh, lattice, cameras, both_sides=both_sides)
    if not found.any():
        return None
    return SeenSurface(lattice, relative_exposure(found), _SMOOTHING * radius)
