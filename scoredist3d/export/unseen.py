"""Replacement of colors where no training camera sees the surface by colors diffused from where it is seen.

Optimization never compares these parts, such as undersides, with the prior. Their colors are what the field happens to
have there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scoredist3d.cameras import Cameras
from scoredist3d.export.visibility import exposure
from scoredist3d.meshes.lattice import Lattice, harmonic, subdivide
from scoredist3d.meshes.mesh import Mesh

_EDGE = 0.05  # longest edge of the lattice, relative to the radius of the mesh around its center
# Exposures between which the values change from the diffused ones to the object's own, and from which the object's own
# are diffused. On a mug seen from -10 to 60 degrees of elevation, the walls have 0.2, the inside has 0.08 or more, and
# the rounded edge of the underside, whose color is already wrong, has 0.02 to 0.07.
_UNSEEN, _SEEN, _CLEAR = 0.02, 0.07, 0.12
_USUAL = 0.2  # exposure of well seen parts; if they have less, as in close-ups, the limits above are lower too
_MOST_SAMPLES = 400_000  # samples from which the colors of the nodes are computed


@dataclass(frozen=True)
class SeenSurface:
    """The surface of a mesh with the confidence in the object's own colors.

    Attributes:
        lattice: Subdivision of the mesh.
        confidence: (T, 3) float32 in [0, 1] for each corner of the lattice: 1 where the cameras see the surface well
            enough, 0 where they do not see it.
        clear: (N,) bool, nodes of the lattice with reliable values, from which the others are diffused.
    """

    lattice: Lattice
    confidence: np.ndarray
    clear: np.ndarray

    def at(self, face: np.ndarray, barycentric: np.ndarray) -> SurfaceSamples:
        """Points of the surface, given by their faces (M,) and the weights (M, 3) of the corners of those faces."""
        triangle, weights = self.lattice.locate(face, barycentric)
        confidence = np.einsum("mk,mk->m", weights, self.confidence[triangle]).clip(0.0, 1.0)
        # Rounding errors must not change the colors of seen parts.
        confidence[self.confidence[triangle].min(axis=1) == 1.0] = 1.0
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
        fixed, known = self._known(values)
        if not len(changed) or not fixed.any():
            return values
        nodes = harmonic(self.surface.lattice, fixed, known)
        corners = self.surface.lattice.triangles[self.triangle[changed]]
        diffused = np.einsum("mk,mkc->mc", self.weights[changed], nodes[corners])
        share = self.confidence[changed, None]
        result = values.copy()
        result[changed] = share * values[changed] + (1.0 - share) * diffused
        return result

    def _known(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which nodes are seen (N,), and the means (N, C) of the samples around them, weighted by the confidence."""
        lattice = self.surface.lattice
        some = slice(None, None, max(1, len(self.triangle) // _MOST_SAMPLES))
        corners, size = lattice.triangles[self.triangle[some]].ravel(), len(lattice.nodes)
        weights = (self.weights[some] * self.confidence[some, None] ** 2).ravel()
        total = np.bincount(corners, weights, size)
        columns = [np.bincount(corners, weights * np.repeat(column, 3), size) for column in values[some].T]
        return self.surface.clear & (total > 0), np.stack(columns, axis=1) / np.maximum(total, 1e-12)[:, None]


def seen_surface(mesh: Mesh, cameras: Cameras, *, both_sides: bool = False) -> SeenSurface | None:
    """The surface of a mesh as the training cameras see it; None if they see no part of it.

    Args:
        mesh: The mesh.
        cameras: Training cameras, spread over their whole range.
        both_sides: Whether views from behind a face count too, as for an open surface.
    """
    low, high = mesh.bounds
    lattice = subdivide(mesh, _EDGE * max(0.5 * float(np.linalg.norm(high - low)), 1e-12))
    found = exposure(mesh, lattice, cameras, both_sides=both_sides)
    if not found.any():
        return None
    found /= min(1.0, float(np.quantile(found[found > 0], 0.9)) / _USUAL)
    ramp = ((found - _UNSEEN) / (_SEEN - _UNSEEN)).clip(0.0, 1.0)
    best = np.zeros(len(lattice.nodes), dtype=np.float32)
    np.maximum.at(best, lattice.triangles.ravel(), found.ravel())
    return SeenSurface(lattice, ramp * ramp * (3.0 - 2.0 * ramp), best >= _CLEAR)
