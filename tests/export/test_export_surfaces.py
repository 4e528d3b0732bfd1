"""Surfaces before baking: meshes of the user, texture coordinates, holes, components, warnings about fields."""

import re
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from shared.export_fields import (
    AnalyticField,
    box,
    position_color,
    sample_texture,
    sphere,
    union,
)
from shared.exports import make_exporter, surface_samples, to_world
from shared.gltf_files import GlbFile
from shared.pbr_shapes import MeshShape, uv_sphere

from scoredist3d.export.exporter import DEFAULT_FACES
from scoredist3d.meshes.holes import boundary_loops, fill_holes
from scoredist3d.meshes.mesh import Mesh, topology
from scoredist3d.meshes.uv import unusable_uvs


def beside(one, other):
    """Two meshes in one; the second is shifted and has its own corner of the texture."""
    shift = np.float32([0.8, 0.0, 0.0])
    uvs = [one.uvs * np.float32([0.85, 1.0]), other.uvs * np.float32([0.1, 0.1]) + np.float32([0.88, 0.0])]
    return Mesh(
        np.concatenate([one.vertices, other.vertices + shift]),
        np.concatenate([one.faces, other.faces + len(one.vertices)]),
        np.concatenate(uvs),
        np.concatenate([one.uv_faces, other.uv_faces + len(one.uvs)]),
    )


def open_box():
    """A box without a top, with large faces."""
    shape = trimesh.creation.box((0.8, 0.8, 0.8)).subdivide().subdivide()
    faces = shape.faces[shape.triangles_center[:, 2] < 0.39]
    return Mesh(shape.vertices.astype(np.float32), faces.astype(np.int64))


def authored(mesh):
    return replace(mesh, authored=True)


def test_own_texture_coordinates_are_kept(tmp_path):
    mesh = uv_sphere()
    result = make_exporter(max_faces=5000, formats=["glb", "obj"]).export(MeshShape(mesh), tmp_path, "own")
    assert (
        result.report.notes == ()
        and result.report.mesh.faces == len(mesh.faces)
        and "unwrap" not in result.report.seconds
    )
    file = GlbFile(tmp_path / "own.glb")
    kept = file.attributes["TEXCOORD_0"] * [1, -1] + [0, 1]
    assert {tuple(row) for row in kept.round(5)} == {tuple(row) for row in mesh.uvs.astype(float).round(5)}
    points, uv, _, _ = surface_samples(file)
    color = sample_texture(file.image(file.material["pbrMetallicRoughness"]["baseColorTexture"]), uv) / 255
    assert np.abs(color - position_color(points).numpy()).mean() < 0.01


def test_own_texture_coordinates_that_cannot_stay_are_reported(tmp_path):
    mesh = uv_sphere()
    result = make_exporter(max_faces=400).export(MeshShape(mesh), tmp_path, "own")
    assert result.report.mesh.faces <= 400
    (note,) = result.report.notes
    assert note.startswith("the mesh's texture coordinates were replaced by new ones: the faces changed (2,208 before")
    assert unusable_uvs(mesh) == ""
    assert "beyond the texture" in unusable_uvs(Mesh(mesh.vertices, mesh.faces, mesh.uvs * 2, mesh.uv_faces))
    assert "100 % of the surface" in unusable_uvs(Mesh(mesh.vertices, mesh.faces, mesh.uvs * 0, mesh.uv_faces))
    folded = 1.0 - np.abs(2.0 * mesh.uvs - 1.0) * [1, 0] - [0, 1] * (1.0 - mesh.uvs)
    folded = Mesh(mesh.vertices, mesh.faces, folded.astype(np.float32), mesh.uv_faces)
    assert re.fullmatch(r"\d\d % of the used texels belong to several faces", unusable_uvs(folded))
    result = make_exporter(max_faces=5000).export(MeshShape(folded), tmp_path, "folded")
    (note,) = result.report.notes
    assert re.search(r"replaced by new ones: \d\d % of the used texels belong to several faces", note)
    assert result.report.mesh.faces == len(mesh.faces) and "unwrap" in result.report.seconds


@pytest.mark.parametrize("uvs", [True, False])
def test_a_user_s_mesh_keeps_its_faces(tmp_path, uvs):
    """The mesh has more faces than the default budget and a component below the default volume limit."""
    mesh = authored(beside(uv_sphere(40, 130), uv_sphere(8, 12, radius=0.05)))
    mesh = mesh if uvs else replace(mesh, uvs=None, uv_faces=None)
    assert len(mesh.faces) > DEFAULT_FACES
    options = {"max_faces": None, "unwrap_timeout": 0.0, "texture_size": 1024, "formats": ["glb", "obj"]}
    result = make_exporter(**options).export(MeshShape(mesh), tmp_path, "own")
    notes = [note for note in result.report.notes if "xatlas" not in note]
    assert notes == [] and result.report.mesh.faces == len(mesh.faces) and result.report.mesh.dropped_components == 0
    file = GlbFile(tmp_path / "own.glb")
    corners = to_world(file.attributes["POSITION"])[file.faces]
    np.testing.assert_array_equal(corners, mesh.vertices[mesh.faces])
    if uvs:
        places = (file.attributes["TEXCOORD_0"] * [1, -1] + [0, 1])[file.faces]
        np.testing.assert_allclose(places, mesh.uvs[mesh.uv_faces], atol=1e-6)
    # The OBJ, too, has the vertices of the user's mesh in their order.
    rows = [line.split() for line in (tmp_path / "own.obj").read_text().splitlines()]
    vertices = np.array([row[1:] for row in rows if row[0] == "v"], dtype=float)
    np.testing.assert_allclose(to_world(vertices), mesh.vertices, atol=1e-6)


def test_a_user_s_mesh_is_simplified_on_request(tmp_path):
    mesh = authored(beside(uv_sphere(), uv_sphere(8, 12, radius=0.05)))
    result = make_exporter(max_faces=400).export(MeshShape(mesh), tmp_path, "own")
    assert result.report.mesh.faces <= 400
    said = f"your mesh was simplified from {len(mesh.faces):,} to {result.report.mesh.faces} faces"
    assert result.report.notes[0] == f"{said}, because exporter.max_faces is 400"
    result = make_exporter(max_faces=None, min_component_volume=0.1).export(MeshShape(mesh), tmp_path, "own")
    assert result.report.mesh.dropped_components == 1 and result.report.mesh.faces == len(uv_sphere().faces)


def test_a_user_s_mesh_may_be_open_or_inside_out(tmp_path):
    mesh = uv_sphere()
    inverted = authored(replace(mesh, faces=mesh.faces[:, ::-1], uv_faces=mesh.uv_faces[:, ::-1]))
    for shape in (inverted, authored(open_box())):
        result = make_exporter(max_faces=None).export(MeshShape(shape), tmp_path, "own")
        assert result.report.mesh.faces == len(shape.faces)


def test_holes_are_closed_on_request(tmp_path):
    mesh = open_box()
    (loop,) = boundary_loops(mesh)
    filled, count = fill_holes(mesh)
    assert count == 1 and len(loop) == 16 and topology(filled).watertight and filled.volume == pytest.approx(0.512)
    open_result = make_exporter().export(MeshShape(mesh), tmp_path, "open")
    assert open_result.report.mesh.holes == 1 and "1 holes; exporter.fill_holes" in open_result.report.notes[0]
    assert GlbFile(tmp_path / "open.glb").material["doubleSided"] is True
    closed = make_exporter(fill_holes=True).export(MeshShape(mesh), tmp_path, "closed")
    assert closed.report.mesh.watertight and closed.report.notes == ("1 holes of the surface were closed",)
    assert GlbFile(tmp_path / "closed.glb").material["doubleSided"] is False


def test_two_holes_that_touch_in_a_vertex_are_closed():
    grid = trimesh.creation.icosphere(subdivisions=2, radius=0.5)
    faces = np.asarray(grid.faces)
    vertex = 20
    around = np.flatnonzero((faces == vertex).any(axis=1))
    # Remove two faces at one vertex that share no edge.
    other = next(f for f in around[1:] if len(set(faces[f]) & set(faces[around[0]])) == 1)
    mesh = Mesh(grid.vertices.astype(np.float32), np.delete(faces, [around[0], other], axis=0).astype(np.int64))
    filled, count = fill_holes(mesh)
    assert count == 2 and topology(filled).watertight and len(filled.faces) == len(faces)


def test_only_the_largest_piece_is_kept_on_request(tmp_path):
    field = AnalyticField(union(sphere(0.4, (-0.4, 0, 0)), sphere(0.3, (0.5, 0, 0))))
    assert make_exporter().export(field, tmp_path, "two").report.mesh.components == 2
    report = make_exporter(largest_component=True).export(field, tmp_path, "one").report
    assert (report.mesh.components, report.mesh.dropped_components) == (1, 1)


def test_untrained_and_cut_fields_are_found_out(tmp_path):
    fog = AnalyticField(sphere(0.6), peak=0.3)
    (note,) = make_exporter().export(fog, tmp_path, "fog").report.notes
    assert "the object is fog" in note and "densities lie in [0, 0.3]" in note and "exporter.threshold" in note
    solid = AnalyticField(sphere(2.0))
    (note,) = make_exporter().export(solid, tmp_path, "solid").report.notes
    assert "was not trained" in note and "densities lie in [500, 500]" in note
    cut = AnalyticField(box((0.3, 0.3, 1.2)))
    (note,) = make_exporter().export(cut, tmp_path, "cut").report.notes
    assert "cut off by the ball of radius 1" in note and "geometry.radius" in note
