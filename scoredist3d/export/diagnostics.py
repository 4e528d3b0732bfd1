"""Warnings about exported surfaces, and the reports on meshes and splats."""

from __future__ import annotations

import numpy as np

from scoredist3d.export.bake import Textures
from scoredist3d.export.report import MeshReport, SplatReport
from scoredist3d.meshes.isosurface_extraction import THRESHOLD_SETTING, FoundSurface
from scoredist3d.meshes.mesh import Mesh, Topology
from scoredist3d.meshes.splats import Splats

# Fractions of the surface that lie on the border of the ball: above the first, the object is reported as cut off; above
# the second, the whole ball is taken to be solid.
_CUT, _BORDER = 0.005, 0.5
_FOG = 0.5  # opacity below which the object is reported as fog


def field_problems(found: FoundSurface, radius: float) -> list[str]:
    """Warnings about a density field that is untrained, transparent or cut off; none for objects that are surfaces."""
    if found.density_range is None or found.spacing is None or found.opacity is None:
        return []
    notes = []
    low, high = found.density_range
    seen = f"densities lie in [{low:.4g}, {high:.4g}] and the surface is at {found.threshold:.4g}"
    if found.opacity < _FOG:
        notes.append(
            f"the object is fog: no ray through it is more than {100 * found.opacity:.0f} % opaque ({seen}); "
            f"train longer, or set {THRESHOLD_SETTING} to a number in that range"
        )
    reach = np.linalg.norm(found.mesh.vertices, axis=1)
    cut = float((reach > radius - 0.1 * found.spacing).mean())
    if cut > _BORDER:
        notes.append(
            f"the surface is the border of the ball of radius {radius:g}: the field is solid everywhere, like one that "
            f"was not trained ({seen}); train longer, or set {THRESHOLD_SETTING} to a higher number in that range"
        )
    elif cut > _CUT:
        notes.append(
            f"{100 * cut:.1f} % of the surface is cut off by the ball of radius {radius:g}; increase "
            "system.geometry.radius"
        )
    return notes


def surface_problems(closed: Topology) -> list[str]:
    """A warning about holes, non-manifold edges and inconsistent winding, if there are any."""
    if closed.watertight:
        return []
    problems = [
        f"{count} {what}"
        for count, what in (
            (closed.holes, "holes"),
            (closed.nonmanifold_edges, "edges with more than two faces"),
            (closed.misoriented_edges, "edges whose faces have inconsistent winding"),
        )
        if count
    ]
    settings = ["exporter.fill_holes"] if closed.holes else []
    advice = ", ".join([*settings, "exporter.smoothing"]) + " or a different exporter.max_faces may help"
    return [f"the surface is not watertight: {', '.join(problems)}; {advice}"]


def meters_per_unit(mesh: Mesh, scale: float, height: float | None) -> float:
    """Meters per scene unit: ``scale``, or if ``height`` is given, the scale that makes the mesh that many meters high.

    Raises:
        ValueError: ``height`` is given and the mesh is flat.
    """
    if height is None:
        return scale
    low, high = mesh.bounds
    if not high[2] > low[2]:
        raise ValueError(
            "exporter.height: the object is flat and cannot be scaled to a height; set exporter.scale instead"
        )
    return height / float(high[2] - low[2])


def mesh_report(
    found: FoundSurface, mesh: Mesh, closed: Topology, dropped: int, scale: float, textures: Textures | None
) -> MeshReport:
    """Report on a mesh.

    Args:
        found: The extracted surface.
        mesh: The simplified mesh.
        closed: Topology of the simplified mesh.
        dropped: Number of components removed as floaters.
        scale: Meters per scene unit in the files.
        textures: The baked textures, if any.
    """
    low, high = mesh.bounds
    channels = [] if textures is None else [name for name, image in vars(textures).items() if image is not None]
    return MeshReport(
        faces=len(mesh.faces),
        vertices=len(mesh.vertices),
        watertight=closed.watertight,
        holes=closed.holes,
        nonmanifold_edges=closed.nonmanifold_edges,
        components=closed.components,
        dropped_components=dropped,
        threshold=found.threshold,
        density_range=found.density_range,
        bounds=(tuple(low.tolist()), tuple(high.tolist())),
        scale=scale,
        channels=tuple(channels),
    )


def splat_report(splats: Splats) -> SplatReport:
    """Report on a set of Gaussians."""
    low, high = (bound.values.tolist() for bound in (splats.means.min(dim=0), splats.means.max(dim=0)))
    return SplatReport(len(splats.means), (tuple(low), tuple(high)))
