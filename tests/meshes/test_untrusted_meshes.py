"""Mesh files from others: files outside of their folder, sizes beyond the limits, and values that are not finite."""

from __future__ import annotations

import base64
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoredist3d import limits
from scoredist3d.geometry.image_canvas import load_image
from scoredist3d.meshes import image_files, mesh_files, splats
from scoredist3d.meshes.image_files import decode_image
from scoredist3d.meshes.images import load_radiance
from scoredist3d.meshes.loading import load_mesh
from scoredist3d.meshes.splats import read_points, read_splats, splat_properties

OBJ = "mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nusemtl a\nf 1/1 2/2 3/3\n"
TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]], "<f4")
PLY = (
    "ply\nformat {format} 1.0\nelement vertex {vertices}\nproperty float x\nproperty float y\nproperty float z\n"
    "element face {faces}\nproperty list uchar int vertex_indices\nend_header\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for meshes, below one with an image that they must not read, to which it also has a link."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "secret.png")
    inside = tmp_path / "inside"
    (inside / "textures").mkdir(parents=True)
    os.symlink(tmp_path / "secret.png", inside / "link.png")
    Image.new("RGB", (4, 4), "blue").save(inside / "textures" / "own image.png")
    Image.new("RGB", (4, 4), "lime").save(inside / "own.png")
    return inside


def obj(folder: Path, statement: str = "", text: str = OBJ) -> Path:
    (folder / "m.mtl").write_text(f"newmtl a\nKd 1 1 1\n{statement}\n")
    (folder / "m.obj").write_text(text)
    return folder / "m.obj"


def uri(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def gltf(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None, faces: Any = (0, 1, 2)) -> Path:
    """A textured triangle, changed before it is written."""
    data = TRIANGLE.tobytes() + TRIANGLE[:, :2].tobytes() + np.array(faces, "<u4").tobytes()
    document: dict[str, Any] = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "indices": 2, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": [{"source": 0}],
        "images": [{"uri": "own.png"}],
        "buffers": [{"byteLength": len(data), "uri": uri(data)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": start, "byteLength": length} for start, length in ((0, 36), (36, 24), (60, 12))
        ],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]},
            {"bufferView": 1, "componentType": 5126, "count": 3, "type": "VEC2"},
            {"bufferView": 2, "componentType": 5125, "count": 3, "type": "SCALAR"},
        ],
    }
    change(document)
    (folder / "g.gltf").write_text(json.dumps(document))
    return folder / "g.gltf"


def png(width: int, height: int) -> bytes:
    """A PNG file that declares a size for which it has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "name", ["../secret.png", "{parent}/secret.png", "link.png", "..\\secret.png", "file:secret.png"]
)
@pytest.mark.parametrize("key", ["map_Kd", "map_Pr", "map_Pm", "norm"])
def test_textures_of_mtl_files_are_inside_of_the_folder(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, key: str
) -> None:
    loaded = load_mesh(obj(folder, f"{key} {name.format(parent=folder.parent)}"))
    assert loaded.base_color is not None and loaded.base_color.tolist() == [[[255, 255, 255]]]
    assert loaded.roughness is None and loaded.metallic is None and loaded.normal is None
    (message,) = caplog.messages
    assert "m.obj: a texture image or material is ignored" in message
    assert "is outside of the folder of the mesh; copy it next to m.obj" in message


def test_material_files_are_inside_of_the_folder(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    obj(folder.parent, "map_Kd secret.png")
    (folder / "a.obj").write_text(OBJ.replace("m.mtl", "../m.mtl"))
    assert load_mesh(folder / "a.obj").mesh.faces.shape == (1, 3)
    assert "the file ../m.mtl is outside of the folder" in caplog.text


@pytest.mark.parametrize(
    ("name", "color"),
    [
        ("own.png", [0, 255, 0]),
        ("textures/own image.png", [0, 0, 255]),
        ("textures\\own image.png", [0, 0, 255]),
        ("textures/../own.png", [0, 255, 0]),
        ("/home/somebody/own.png", [0, 255, 0]),
    ],
)
def test_textures_in_the_folder_are_read(folder: Path, name: str, color: list[int]) -> None:
    loaded = load_mesh(obj(folder, f"map_Kd {name}"))
    assert loaded.base_color is not None and loaded.base_color[0, 0].tolist() == color


@pytest.mark.parametrize(
    "name", ["../secret.png", "{parent}/secret.png", "link.png", "%2e%2e/secret.png", "file:///{parent}/secret.png"]
)
def test_images_of_gltf_files_are_inside_of_the_folder(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    loaded = load_mesh(gltf(folder, lambda d: d.update(images=[{"uri": name.format(parent=folder.parent)}])))
    assert loaded.base_color is None
    (message,) = caplog.messages
    assert "is outside of the folder of the mesh; copy it next to g.gltf" in message


def test_escaped_names_of_gltf_files_are_read(folder: Path) -> None:
    loaded = load_mesh(gltf(folder, lambda d: d.update(images=[{"uri": "textures/own%20image.png"}])))
    assert loaded.base_color is not None and loaded.base_color[0, 0].tolist() == [0, 0, 255]


def test_buffers_of_gltf_files_are_inside_of_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read g\.gltf .*\.\./secret\.png is outside of the folder"):
        load_mesh(gltf(folder, lambda d: d["buffers"][0].update(uri="../secret.png")))


def test_images_in_gltf_files_are_limited(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for data, reason in (
        (png(50_000, 50_000), "its size is 50000 x 50000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not an image of a supported format"),
        (png(12_000, 10_000), "it is damaged"),
    ):
        caplog.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_mesh(gltf(folder, lambda d, data=data: d.update(images=[{"uri": uri(data)}])))  # type: ignore[misc]
        assert loaded.base_color is None
        assert reason in caplog.text and len(caplog.messages) == 1


def test_images_of_mtl_files_are_limited(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "bomb.png").write_bytes(png(limits.MAX_IMAGE_SIDE + 1, 8))
    loaded = load_mesh(obj(folder, "map_Kd bomb.png\nmap_Pr bomb.png"))
    assert loaded.roughness is None and loaded.base_color is not None and loaded.base_color.shape == (1, 1, 3)
    assert "its size is 16385 x 8 pixels" in caplog.text and "bomb.png: its size is 16385 x 8" in caplog.text


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp"])
def test_images_are_limited_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40, 30)).save(path)
    monkeypatch.setattr(image_files, "MAX_IMAGE_SIDE", 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # Pillow's own limit, which would raise, is replaced
    assert decode_image(path, "RGB").size == (40, 30) and Image.MAX_IMAGE_PIXELS == 1
    monkeypatch.setattr(image_files, "MAX_IMAGE_SIDE", 39)
    monkeypatch.setattr(Image.Image, "convert", pytest.fail)
    for load in (lambda: load_radiance(path, key="key"), lambda: load_image(path, 8)):
        with pytest.raises(ValueError, match=r"cannot (be )?read.*its size is 40 x 30 pixels.* at most 39 x 39"):
            load()
    monkeypatch.setattr(image_files, "MAX_IMAGE_BYTES", path.stat().st_size - 1)
    with pytest.raises(ValueError, match="is too large"):
        load_radiance(path, key="key")


@pytest.mark.parametrize(
    ("head", "size", "message"),
    [
        ("", "-Y 16385 +X 8", "its size is 8 x 16385 pixels"),
        ("", "-Y 0 +X 8", "its size is 8 x 0 pixels"),
        ("", "-Y -4 +X 8", "its size is 8 x -4 pixels"),
        ("", "-Y 16384 +X 16384", "pixel data is truncated"),
        ("EXPOSURE=0\n", "-Y 1 +X 1", "exposure is 0"),
        ("EXPOSURE=nan\n", "-Y 1 +X 1", "exposure is nan"),
        ("EXPOSURE=1e-30\n", "-Y 1 +X 1", "pixels are infinite"),
    ],
)
def test_radiance_files_are_limited_and_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, size: str, message: str
) -> None:
    if "truncated" in message:
        monkeypatch.setattr(np, "empty", pytest.fail)  # nothing is allocated for the declared size
    path = tmp_path / "a.hdr"
    path.write_bytes(f"#?RADIANCE\n{head}\n{size}\n".encode() + bytes((255, 255, 255, 255)))
    with pytest.raises(ValueError, match=message):
        load_radiance(path, key="key")


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl", "glb", "gltf"])
def test_meshes_have_a_limit_of_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with path.open("wb") as file:
        file.truncate(limits.MAX_MESH_BYTES + 1)  # sparse
    with pytest.raises(ValueError, match=r"is too large: it has 2,147,483,649 bytes, and a mesh may have at most"):
        load_mesh(path)
    if suffix == "ply":
        with pytest.raises(ValueError, match=r"is too large|not a PLY file"):
            read_points(path)


def test_other_files_of_a_mesh_have_a_limit_of_bytes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (folder / "own.png").open("wb") as file:
        file.truncate(limits.MAX_MESH_BYTES + 1)
    load_mesh(obj(folder, "map_Kd own.png"))
    assert "own.png is too large" in caplog.text


def test_meshes_have_a_limit_of_faces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use of an object in a scene counts."""
    monkeypatch.setattr(mesh_files, "MAX_FACES", 3)
    for count in (3, 4):
        path = gltf(folder, lambda d, n=count: d.update(nodes=[{"mesh": 0}] * n, scenes=[{"nodes": [*range(n)]}]))  # type: ignore[misc]
        if count == 3:
            assert len(load_mesh(path).mesh.faces) == 3
    with pytest.raises(ValueError, match=r"g\.gltf has more than 3 triangles: simplify it first"):
        load_mesh(path)


@pytest.mark.parametrize(
    ("form", "vertices", "faces", "message"),
    [
        (
            "binary_little_endian",
            3,
            limits.MAX_FACES + 1,
            "has 20,000,001 faces, and a mesh may have at most 20,000,000",
        ),
        ("binary_little_endian", 3, limits.MAX_FACES, "declares 20,000,000 elements 'face', but it has"),
        ("binary_big_endian", 10**12, 1, "declares 1,000,000,000,000 elements 'vertex', but it has"),
        ("ascii", 10**12, 1, "declares 1,000,000,000,000 elements 'vertex', but it has"),
    ],
)
def test_declared_sizes_of_ply_files_are_checked(
    tmp_path: Path, form: str, vertices: int, faces: int, message: str
) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(PLY.format(format=form, vertices=vertices, faces=faces).encode() + bytes(100))
    with pytest.raises(ValueError, match=rf"cannot read a\.ply as a \.ply file: it.* {message}"):
        load_mesh(path)


def test_values_without_data_in_gltf_files_are_limited(folder: Path) -> None:
    empty = {"componentType": 5126, "count": 10**11, "type": "VEC3"}
    with pytest.raises(ValueError, match=r"it declares 1,200,000,000,000 bytes of values without data"):
        load_mesh(gltf(folder, lambda d: d["accessors"].append(empty)))
    path = folder / "a.glb"
    for data in (b"glTF", b"glTF" + struct.pack("<IIII", 2, 28, 2**31, 0x4E4F534A)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot read a\.glb as a \.glb file: it is truncated"):
            load_mesh(path)


@pytest.mark.parametrize("index", ["99", "-9"])
def test_faces_of_obj_files_refer_to_vertices(folder: Path, index: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read m\.obj .*it refers to vertices .* that it does not contain"):
        load_mesh(obj(folder, text=OBJ.replace("f 1/1", f"f {index}/1")))


@pytest.mark.parametrize("index", [7, -1])
def test_faces_of_ply_and_gltf_files_refer_to_vertices(folder: Path, index: int) -> None:
    (folder / "a.ply").write_text(
        PLY.format(format="ascii", vertices=3, faces=1) + f"0 0 0\n1 0 0\n1 1 0\n3 0 1 {index}\n"
    )
    with pytest.raises(ValueError, match=r"a\.ply has faces with the vertices .* but the vertices 0 to 2: repair"):
        load_mesh(folder / "a.ply")
    with pytest.raises(
        ValueError, match=r"g\.gltf has faces with the vertices 0 to .* but the vertices 0 to 2: repair"
    ):
        load_mesh(gltf(folder, faces=np.array([0, 1, index]).astype("<u4")))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39", "1e300"])
def test_coordinates_are_finite(folder: Path, value: str) -> None:
    """Finite doubles can be infinite as float32."""
    for line, what in (("v 1 1 0", "vertex"), ("vt 1 1", "texture")):
        text = OBJ.replace(line, line.replace("1", value, 1))
        with pytest.raises(
            ValueError, match=rf"m\.obj has {what} coordinates that are not finite: repair the file first"
        ):
            load_mesh(obj(folder, text=text))


def test_factors_of_materials_are_finite(folder: Path) -> None:
    for statement in ("Kd nan 0 0", "Pr inf", "Pm word"):
        with pytest.raises(ValueError, match=r"m\.obj has a material whose factors are not finite"):
            load_mesh(obj(folder, statement))
    with pytest.raises(ValueError, match=r"g\.gltf has a material whose factors are not finite"):
        load_mesh(
            gltf(folder, lambda d: d["materials"][0]["pbrMetallicRoughness"].update(roughnessFactor=float("nan")))
        )


def write_splats(path: Path, **values: float) -> Path:
    """Two Gaussians with the given values of the second one; all others are 1."""
    names = splat_properties(0)
    rows = np.ones((2, len(names)), "<f4")
    rows[1] = [values.get(name, 1.0) for name in names]
    properties = "".join(f"property float {name}\n" for name in names)
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex 2\n{properties}end_header\n"
    path.write_bytes(head.encode() + rows.tobytes())
    return path


@pytest.mark.parametrize("name", ["x", "f_dc_0", "opacity", "scale_1", "rot_3"])
def test_values_of_splats_are_finite(tmp_path: Path, name: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=r"a\.ply: some values of .* are not finite: repair the file first"):
            read_splats(write_splats(tmp_path / "a.ply", **{name: value}))


def test_scales_and_quaternions_of_splats_are_finite(tmp_path: Path) -> None:
    """The file has logarithms of scales, and quaternions whose length may be infinite as float32."""
    with pytest.raises(ValueError, match=r"a\.ply: a scale \(scale_0 to scale_2\) is infinite: repair the file first"):
        read_splats(write_splats(tmp_path / "a.ply", scale_2=89.0))
    with pytest.raises(ValueError, match=r"a\.ply: a quaternion \(rot_0 to rot_3\) is zero or infinite"):
        read_splats(write_splats(tmp_path / "a.ply", rot_0=3e38))
    loaded = read_splats(write_splats(tmp_path / "a.ply", scale_2=-200.0))
    assert all(bool(torch.isfinite(value).all()) for value in (loaded.means, loaded.scales, loaded.quaternions))


def test_point_clouds_have_a_limit_of_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_splats(tmp_path / "a.ply")
    assert len(read_points(path)[0]) == 2
    monkeypatch.setattr(splats, "MAX_POINTS", 1)
    with pytest.raises(ValueError, match=r"a\.ply has 2 points, and at most 1 are read"):
        read_points(path)
