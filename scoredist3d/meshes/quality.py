"""Quality of the surface of a triangle mesh: handles and creases, which noise creates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoredist3d.meshes.mesh import Mesh, separate_sheets, topology
from scoredist3d.ops.mesh.regularizers import face_normals
from scoredist3d.ops.mesh.topology import edge_faces, euler_characteristic


def genus(mesh: Mesh) -> int:
    """Number of handles of a mesh, summed over its components: 0 for spheres and disks, 1 for a torus.

    With C components, B boundary loops and the Euler characteristic X, the genus is C - (X + B) / 2. Sheets that only
    touch, at a vertex or a non-manifold edge, count as separate.
    """
    mesh = separate_sheets(mesh)
    counts = topology(mesh)
    return counts.components - (euler_characteristic(torch.from_numpy(mesh.faces)) + counts.holes) // 2


@dataclass(frozen=True)
class Dihedrals:
    """Angles at the ``E`` edges of a mesh that have exactly two faces, none of them degenerate.

    Attributes:
        angles_deg: (E,) float64, angle between the normals of both faces in degrees: 0 where the surface is flat, up
            to 180 where it is folded.
        lengths: (E,) float64, lengths of the edges.
    """

    angles_deg: np.ndarray
    lengths: np.ndarray

    @property
    def mean_deg(self) -> float:
        """Mean angle in degrees, weighted by length; 0 if there are no edges."""
        return float((self.angles_deg * self.lengths).sum() / max(float(self.lengths.sum()), 1e-30))

    def share_above(self, limit_deg: float) -> float:
        """Share, in [0, 1], of the total edge length whose angle exceeds ``limit_deg``; 0 if there are no edges."""
        return float(self.lengths[self.angles_deg > limit_deg].sum() / max(float(self.lengths.sum()), 1e-30))


def angles_deg(first: Tensor, second: Tensor) -> Tensor:
    """Angles (N,) in degrees, in [0, 180], between vectors (N, 3); accurate at small angles, unlike the arc cosine."""
    return torch.rad2deg(torch.atan2(torch.linalg.cross(first, second).norm(dim=1), (first * second).sum(dim=1)))


def dihedrals(mesh: Mesh) -> Dihedrals:
    """Angles between adjacent faces of a mesh, and the lengths of their common edges."""
    vertices = torch.from_numpy(np.ascontiguousarray(mesh.vertices, dtype=np.float64))
    faces = torch.from_numpy(np.ascontiguousarray(mesh.faces))
    adjacency, normals = edge_faces(faces), face_normals(vertices, faces)
    proper = normals.square().sum(dim=1) > 0
    inner = (adjacency.counts == 2) & proper[adjacency.faces].all(dim=1)
    first, second = normals[adjacency.faces[inner]].unbind(dim=1)
    start, end = vertices[adjacency.edges[inner]].unbind(dim=1)
    return Dihedrals(angles_deg(first, second).numpy(), (end - start).norm(dim=1).numpy())
