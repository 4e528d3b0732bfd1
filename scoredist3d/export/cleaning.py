"""Clean-up and simplification of the surface of an object before it is exported."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scoredist3d.export.stages import Notes
from scoredist3d.meshes.holes import fill_holes
from scoredist3d.meshes.mesh import Mesh, decimate, drop_small_components, smooth
from scoredist3d.meshes.tunnels import fill_tunnels


@dataclass(frozen=True)
class CleanSurface:
    """A surface without holes, floaters and noise.

    Attributes:
        mesh: The surface. Its ``faces`` are the array of the given surface if no face was added or dropped.
        dropped_components: Number of components that were dropped as floaters.
        filled_tunnels: Number of tunnels that were filled.
    """

    mesh: Mesh
    dropped_components: int
    filled_tunnels: int


def clean_surface(
    mesh: Mesh, *, close_holes: bool, least_volume: float | None, longest_tunnel: float, smoothing: int, notes: Notes
) -> CleanSurface:
    """Clean a surface.

    Args:
        mesh: The surface of the object; its texture coordinates are dropped.
        close_holes: Whether to close the boundary loops.
        least_volume: Volume below which components are dropped, as a fraction of the largest one; None keeps all.
        longest_tunnel: Length in scene units of the longest loop around a tunnel that is filled; 0 keeps all tunnels.
        smoothing: Number of Taubin smoothing steps.
        notes: Receives the number of holes.
    """
    surface, dropped = replace(mesh, uvs=None, uv_faces=None), 0
    if close_holes:
        surface, count = fill_holes(surface)
        notes.add(*([f"{count} holes of the surface were closed"] if count else []))
    if least_volume is not None:
        surface, dropped = drop_small_components(surface, least_volume)
    surface, tunnels = fill_tunnels(surface, longest_tunnel)
    if smoothing:
        surface = smooth(surface, smoothing)
    return CleanSurface(replace(surface, authored=mesh.authored), dropped, tunnels)


def simplify_surface(surface: Mesh, max_faces: int, least_volume: float | None, notes: Notes) -> Mesh:
    """The surface, decimated to ``max_faces``; the same object if it already has few enough faces.

    Args:
        surface: The surface.
        max_faces: Maximum number of faces.
        least_volume: As for :func:`clean_surface`.
        notes: Receives a note if a mesh of the user's own is simplified.
    """
    if len(surface.faces) <= max_faces:
        return surface
    mesh = decimate(surface, max_faces)
    if least_volume is not None:
        # Splitting non-manifold vertices can create tiny components.
        mesh, _ = drop_small_components(mesh, least_volume)
    if surface.authored:
        sizes = f"{len(surface.faces):,} to {len(mesh.faces):,} faces"
        notes.add(f"your mesh was simplified from {sizes}, because exporter.max_faces is {max_faces:,}")
    return mesh
