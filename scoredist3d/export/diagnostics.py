"""What an export has to say about the surface it found."""

from __future__ import annotations

import numpy as np

from scoredist3d.export.bake import Textures
from scoredist3d.export.base import ExportReport
from scoredist3d.meshes.isosurface_extraction import THRESHOLD_SETTING, FoundSurface
from scoredist3d.meshes.mesh import Mesh, Topology

# Fractions of the surface on the ball's border: worth a note, and nothing but the border.
_CUT, _BORDER = 0.005, 0.5
_FOG = 0.5  # opacity


def findings(found: FoundSurface, radius: float) -> list[str]:
    """Sentences about a field that looks untrained, transparent or cut off; none about shapes that are surfaces."""
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
            f"the surface is the border of the ball of radius {radius:g}: the field is solid throughout, as one that "
            f"was not trained ({seen}); train longer, or set {THRESHOLD_SETTING} to a higher number in that range"
        )
    elif cut > _CUT:
        notes.append(
            f"{100 * cut:.1f} % of the surface is cut off by the ball of radius {radius:g}; set system.geometry.radius "
            "higher for a larger one"
        )
    return notes


def not_closed(closed: Topology) -> list[str]:
    """A sentence on holes and non-manifold edges, if there are any."""
    if closed.watertight:
        return []
    problems = [
        f"{count} {what}"
        for count, what in (
            (closed.holes, "holes"),
            (closed.nonmanifold_edges, "edges with more than two faces"),
            (closed.misoriented_edges, "edges whose faces disagree about the outside"),
        )
        if count
    ]
    settings = ["exporter.fill_holes"] if closed.holes else []
    advice = ", ".join([*settings, "exporter.smoothing"]) + " or another exporter.max_faces may help"
    return [f"the surface is not watertight: {', '.join(problems)}; {advice}"]


def metres(mesh: Mesh, scale: float, height: float | None) -> float:
    """Metres per scene unit: ``scale``, or what makes the mesh ``height`` metres high.

    Raises:
        ValueError: A height is wanted of a mesh that has none.
    """
    if height is None:
        return scale
    low, high = mesh.bounds
    if not high[2] > low[2]:
        raise ValueError("exporter.height: the object is flat, so no scale makes it that high; set exporter.scale")
    return height / float(high[2] - low[2])


def mesh_report(
    found: FoundSurface, mesh: Mesh, closed: Topology, dropped: int, scale: float, textures: Textures | None
) -> ExportReport:
    """The report of a mesh; sizes, times and notes are filled in later."""
    low, high = mesh.bounds
    channels = [] if textures is None else [name for name, image in vars(textures).items() if image is not None]
    return ExportReport(
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
        bytes={},
        seconds={},
        notes=(),
        scale=scale,
        channels=tuple(channels),
    )
