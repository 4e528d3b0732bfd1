"""Warnings about exported surfaces, and the reports on meshes and splats."""

from __future__ import annotations

import numpy as np

from scoredist3d.export.bake import Textures
from scoredist3d.export.cleaning import CleanSurface
from scoredist3d.export.frame import Frame
from scoredist3d.export.report import CheckReport, MeshReport, SplatReport
from scoredist3d.meshes.isosurface_extraction import THRESHOLD_SETTING, FoundSurface
from scoredist3d.meshes.mesh import Mesh, Topology
from scoredist3d.meshes.quality import dihedrals, genus
from scoredist3d.meshes.splats import Splats

# Fractions of the surface that lie on the border of the ball: above the first, the object is reported as cut off; above
# the second, the whole ball is taken to be solid.
_CUT, _BORDER = 0.005, 0.5
_FOG = 0.5  # opacity below which the object is reported as fog
SHARP_DEG = 45.0  # angle between adjacent faces above which an edge is sharp
# Figures of poor meshes. Known poor results had genus 24, a mean dihedral angle of 28 degrees, 20 % sharp edges, 5 % of
# the pixels off, 22 dB and only clipped texels; known good ones 1, 4 to 7 degrees, 1 %, 0.6 %, 29 dB and none.
_GENUS, _DIHEDRAL_DEG, _SHARP = 8, 15.0, 0.08
_SEE_THROUGH, _OFF_DEPTH, _PSNR, _CLIPPED = 0.02, 0.025, 25.0, 0.5


def field_problems(found: FoundSurface, radius: float) -> list[str]:
    """Warnings about a density field that is untrained, transparent or cut off; none for objects that are surfaces."""
    if found.density_range is None or found.spacing is None or found.opacity is None:
        return []
    notes = []
    low, high = found.density_range
    place = "fused from renders" if found.threshold is None else f"at {found.threshold:.4g}"
    seen = f"densities lie in [{low:.4g}, {high:.4g}] and the surface is {place}"
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


def crease_problems(mesh: MeshReport) -> list[str]:
    """Warnings about many handles and about crumples of a surface that was optimized."""
    if _fused(mesh):
        advice = "a lower exporter.resolution, longer training or a mesh stage may help"
    elif mesh.threshold is None:
        advice = "a larger weight of system.loss.normal-consistency or longer training may help"
    else:
        advice = f"a lower {THRESHOLD_SETTING}, a lower exporter.resolution or longer training may help"
    notes = []
    if mesh.genus > _GENUS:
        notes.append(f"the surface has {mesh.genus} handles (genus), which often are noise; {advice}")
    if mesh.mean_dihedral_deg > _DIHEDRAL_DEG or mesh.sharp_edges > _SHARP:
        notes.append(
            f"the surface is crumpled: adjacent faces meet at {mesh.mean_dihedral_deg:.1f} degrees on average, and "
            f"{100 * mesh.sharp_edges:.1f} % of the edge length is sharper than {SHARP_DEG:g} degrees; {advice}"
        )
    return notes


def _fused(mesh: MeshReport) -> bool:
    """Whether the surface of a density field was fused from renders of the depth."""
    return mesh.threshold is None and mesh.density_range is not None


def _depth_advice(mesh: MeshReport, *, behind: bool) -> str:
    """The setting that moves a surface; ``behind`` says whether it lies behind the object or in front of it."""
    if mesh.density_range is None:
        return "increase exporter.max_faces"
    if mesh.threshold is None:
        return f"set {THRESHOLD_SETTING} to a density"
    return f"{'lower' if behind else 'increase'} {THRESHOLD_SETTING}"


def check_problems(check: CheckReport, mesh: MeshReport) -> list[str]:
    """Warnings about a mesh that differs from its object in coverage, depth or color, and about clipped colors."""
    notes = []
    if check.see_through is not None and check.see_through > _SEE_THROUGH:
        advice = [] if mesh.threshold is None else [f"lower {THRESHOLD_SETTING}"]
        advice += [f"set {THRESHOLD_SETTING} to a density"] if _fused(mesh) else []
        advice += ["lower exporter.min_component_volume"] if mesh.dropped_components else []
        notes.append(
            f"the mesh is missing in {100 * check.see_through:.1f} % of the object's pixels; "
            f"{' or '.join(advice or ['increase exporter.max_faces'])}"
        )
    if check.off_depth is not None and check.behind is not None and check.off_depth > _OFF_DEPTH:
        behind = check.behind > 0.5 * check.off_depth
        notes.append(
            f"the mesh lies off the object's depth in {100 * check.off_depth:.1f} % of the pixels, mostly "
            f"{'behind' if behind else 'in front of'} it; "
            f"{_depth_advice(mesh, behind=behind)}"
        )
    if check.psnr is not None and check.psnr < _PSNR:
        outline = "" if mesh.threshold is None else f"{THRESHOLD_SETTING} changes its outline, and "
        notes.append(
            f"the mesh looks unlike the object (PSNR {check.psnr:.1f} dB); {outline}larger values of "
            "exporter.texture_size and exporter.max_faces give more detail"
        )
    if check.clipped_texels is not None and check.clipped_texels > _CLIPPED:
        notes.append(
            f"the colors are saturated: {100 * check.clipped_texels:.0f} % of the texels have a channel at 0 or 255; "
            "lower system.guidance.guidance_scale"
        )
    return notes


def mesh_report(
    found: FoundSurface, mesh: Mesh, closed: Topology, cleaned: CleanSurface, frame: Frame, textures: Textures | None
) -> MeshReport:
    """Report on a mesh.

    Args:
        found: The extracted surface.
        mesh: The simplified mesh.
        closed: Topology of the simplified mesh.
        cleaned: The surface before simplification.
        frame: Unit and origin of the files.
        textures: The baked textures, if any.
    """
    low, high = mesh.bounds
    creases = dihedrals(mesh)
    return MeshReport(
        faces=len(mesh.faces),
        vertices=len(mesh.vertices),
        watertight=closed.watertight,
        holes=closed.holes,
        nonmanifold_edges=closed.nonmanifold_edges,
        components=closed.components,
        dropped_components=cleaned.dropped_components,
        genus=genus(mesh),
        mean_dihedral_deg=creases.mean_deg,
        sharp_edges=creases.share_above(SHARP_DEG),
        threshold=found.threshold,
        density_range=found.density_range,
        bounds=(tuple(low.tolist()), tuple(high.tolist())),
        scale=frame.scale,
        origin=frame.origin,
        channels=() if textures is None else tuple(textures.named()),
        filled_tunnels=cleaned.filled_tunnels,
        filled_texels=None if textures is None else textures.filled,
    )


def splat_report(splats: Splats, frame: Frame) -> SplatReport:
    """Report on a set of Gaussians.

    Args:
        splats: The Gaussians.
        frame: Unit and origin of the file.
    """
    low, high = (bound.values.tolist() for bound in (splats.means.min(dim=0), splats.means.max(dim=0)))
    return SplatReport(len(splats.means), (tuple(low), tuple(high)), frame.scale, frame.origin)
