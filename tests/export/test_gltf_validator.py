"""Validation of every kind of exported GLB by the Khronos validator."""

import numpy as np
import pytest
import validate_gltf
from shared.export_fields import AnalyticField, sphere, torus
from shared.pbr_shapes import MeshShape, PbrBall, uv_sphere

from scoredist3d import registry
from scoredist3d.meshes.mesh import Mesh

pytestmark = pytest.mark.skipif(bool(validate_gltf.problem()), reason=validate_gltf.problem() or "can be run")

FLIPPED = uv_sphere()
FLIPPED = Mesh(FLIPPED.vertices, FLIPPED.faces, FLIPPED.uvs * [-1, 1] + np.float32([1, 0]), FLIPPED.uv_faces)
OPEN = Mesh(FLIPPED.vertices, FLIPPED.faces[:-200], FLIPPED.uvs, FLIPPED.uv_faces[:-200])
CASES = {
    "plain": (AnalyticField(torus(0.5, 0.2), softness=0.01), {}),
    "unlit": (AnalyticField(sphere(0.5)), {"unlit": True}),
    "face-atlas": (AnalyticField(sphere(0.5)), {"unwrap_timeout": 0.0, "max_faces": 300}),
    "roughness": (PbrBall("roughness"), {}),
    "all-channels": (PbrBall("roughness", "metallic", "normal", "occlusion"), {"height": 0.3}),
    "detail": (AnalyticField(torus(0.5, 0.2), softness=0.01), {"normal_map": "surface", "max_faces": 300}),
    "occlusion": (AnalyticField(torus(0.5, 0.2), softness=0.01), {"occlusion": True}),
    "own-uvs": (MeshShape(uv_sphere()), {"max_faces": 5000}),
    "mirrored-uvs-with-tangents": (MeshShape(FLIPPED), {"max_faces": 5000, "normal_map": "surface"}),
    "open": (MeshShape(OPEN), {"max_faces": 5000}),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    entry = registry.lookup("exporter", "textured-mesh")
    for name, (shape, options) in CASES.items():
        options = {"resolution": 32, "texture_size": 128, "max_faces": 800, "formats": ["glb"]} | options
        entry.cls(entry.config_cls(check=False, **options)).export(shape, folder, name)
    return dict(zip(CASES, validate_gltf.validate([folder / f"{name}.glb" for name in CASES]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_no_errors_and_no_warnings(reports, name):
    report = reports[name]
    messages = "\n".join(validate_gltf.describe(report))
    assert report["issues"]["numErrors"] == report["issues"]["numWarnings"] == 0, messages
    assert report["info"]["totalTriangleCount"] > 100 and report["info"]["hasTextures"], messages


def test_the_validator_finds_errors(tmp_path):
    entry = registry.lookup("exporter", "textured-mesh")
    options = entry.config_cls(resolution=16, texture_size=64, max_faces=100, formats=["glb"], check=False)
    (path,) = entry.cls(options).export(AnalyticField(sphere(0.5)), tmp_path, "ball").paths
    path.write_bytes(path.read_bytes().replace(b'"type":"VEC3"', b'"type":"VEC2"', 1))
    (report,) = validate_gltf.validate([path])
    assert report["issues"]["numErrors"] > 0
    assert validate_gltf.main([str(path)]) == 1
