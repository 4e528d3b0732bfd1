"""The exporter fills tiny tunnels before simplification and reports how many."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shared.export_fields import AnalyticField
from shared.exports import make_exporter
from shared.pbr_shapes import MeshShape
from shared.tunnel_scenes import plate, surface

from scoredist3d.config import ConfigError
from scoredist3d.export.cleaning import clean_surface
from scoredist3d.export.report import MeshReport
from scoredist3d.export.stages import Notes
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.uv import unusable_uvs, unwrap

HOLES = plate((0.0, 0.0, 0.015), (0.35, 0.35, 0.1))
"""A plate with a pinhole, around which 0.1 to 0.15 of the radius are long, and a hole that is no noise."""
SPACING = 128


def with_pinhole() -> Mesh:
    return surface(HOLES, SPACING)


def exported(mesh: Mesh, folder: Path, **options: float) -> MeshReport:
    exporter = make_exporter(**{"formats": ["stl"], "max_faces": 4000} | options)
    report = exporter.export(MeshShape(mesh), folder, "plate").report
    assert report.mesh is not None and report.mesh.watertight
    return report.mesh


def test_a_pinhole_is_filled_by_default_and_reported(tmp_path: Path) -> None:
    report = exported(with_pinhole(), tmp_path)
    assert (report.genus, report.filled_tunnels, report.components) == (1, 1, 1)
    assert "genus 1 (filled tunnels: 1), " in report.describe()


def test_the_surface_before_simplification_has_no_tunnel_either(tmp_path: Path) -> None:
    import trimesh

    mesh = with_pinhole()
    exported(mesh, tmp_path)
    full = trimesh.load(tmp_path / "plate.stl")
    assert len(full.faces) > len(mesh.faces) > 4000
    assert full.is_watertight and full.euler_number == 0


def test_the_option_keeps_tunnels(tmp_path: Path) -> None:
    report = exported(with_pinhole(), tmp_path, max_tunnel_girth=0.0)
    assert (report.genus, report.filled_tunnels) == (2, 0)
    assert "genus 2, " in report.describe()


def test_the_girth_is_relative_to_the_radius_of_the_object(tmp_path: Path) -> None:
    mesh = with_pinhole()
    small = replace(mesh, vertices=0.3 * mesh.vertices)
    shape = MeshShape(small)
    exporter = make_exporter(formats=["stl"], max_tunnel_girth=0.05)
    filled = {}
    for shape.radius in (0.3, 1.0):
        report = exporter.export(shape, tmp_path, "plate").report.mesh
        assert report is not None
        filled[shape.radius] = report.filled_tunnels
    assert filled == {0.3: 0, 1.0: 1}


def test_a_field_is_treated_like_a_surface(tmp_path: Path) -> None:
    field = AnalyticField(HOLES, softness=0.02)
    exporter = make_exporter(formats=["stl"], resolution=SPACING, threshold=250.0, max_faces=4000)
    report = exporter.export(field, tmp_path, "plate").report
    assert report.mesh is not None and (report.mesh.genus, report.mesh.filled_tunnels) == (1, 1)
    assert report.to_dict()["filled_tunnels"] == 1
    json.dumps(report.to_dict())


def test_a_mesh_of_the_user_and_one_with_texture_coordinates_keep_their_tunnels(tmp_path: Path) -> None:
    mesh = surface(plate((0.0, 0.0, 0.05)), 40)
    authored = replace(mesh, authored=True)
    unwrapped, _ = unwrap(mesh, 512, timeout=0.0)
    assert unusable_uvs(unwrapped) == "" and not unwrapped.authored
    for kept in (authored, unwrapped):
        report = exported(kept, tmp_path, max_faces=len(mesh.faces), max_tunnel_girth=0.5)
        assert (report.genus, report.filled_tunnels, report.faces) == (1, 0, len(mesh.faces))
    assert exported(mesh, tmp_path, max_faces=len(mesh.faces), max_tunnel_girth=0.5).filled_tunnels == 1


def test_clean_surfaces_keep_their_faces() -> None:
    mesh = replace(surface(plate(), 40), authored=True)
    options = {"close_holes": True, "least_volume": 0.02, "longest_tunnel": 0.5, "smoothing": 0}
    cleaned = clean_surface(mesh, **options, notes=Notes())
    assert cleaned.mesh.faces is mesh.faces and cleaned.mesh.authored
    assert (cleaned.dropped_components, cleaned.filled_tunnels) == (0, 0)


def test_tunnels_of_an_open_surface_are_filled_once_its_holes_are_closed() -> None:
    mesh = surface(plate((0.0, 0.0, 0.03)))
    opened = replace(mesh, faces=np.delete(mesh.faces, 0, axis=0))
    options = {"least_volume": None, "longest_tunnel": 0.3, "smoothing": 2, "notes": Notes()}
    kept = clean_surface(opened, close_holes=False, **options)
    assert kept.filled_tunnels == 0 and topology(kept.mesh).holes == 1
    assert clean_surface(opened, close_holes=True, **options).filled_tunnels == 1


def test_a_negative_girth_is_rejected() -> None:
    with pytest.raises(ConfigError, match="max_tunnel_girth"):
        make_exporter(max_tunnel_girth=-0.1)
