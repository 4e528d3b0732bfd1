"""PLY files of Gaussians: comparison with an independent reader, and damaged files."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scoredist3d.export.formats.splats import write_splats
from scoredist3d.export.frame import to_y_up
from scoredist3d.meshes.splats import Splats, read_points, read_splats
from scoredist3d.ops.rotations import quaternion_product
from scoredist3d.ops.shading.spherical_harmonics import harmonics

ORIGINAL_ORDER = [
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
    *(f"f_rest_{index}" for index in range(45)),
    *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
]


def cloud(count: int = 5, degree: int = 3, seed: int = 0) -> Splats:
    generator = torch.Generator().manual_seed(seed)
    kept = (degree + 1) ** 2 - 1
    return Splats(
        torch.randn(count, 3, generator=generator),
        torch.rand(count, 3, generator=generator) + 0.01,
        torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=-1),
        0.05 + 0.9 * torch.rand(count, generator=generator),
        torch.rand(count, 3, generator=generator),
        torch.randn(count, kept, 3, generator=generator) if kept else None,
    )


def matrices(quaternions: np.ndarray) -> np.ndarray:
    """Rotation matrices (N, 3, 3) by the textbook formula, w first."""
    w, x, y, z = quaternions.T
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def independent_reader(path: Path) -> tuple[list[str], np.ndarray]:
    """Property names and values (N, P) of a PLY file of floats, read with struct alone."""
    raw = path.read_bytes()
    head, data = raw.split(b"end_header\n", 1)
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    (count,) = (int(line.split()[-1]) for line in lines if line.startswith("element vertex "))
    names = [line.split()[-1] for line in lines if line.startswith("property float ")]
    assert sum(line.startswith("property") for line in lines) == len(names)
    assert len(data) == 4 * count * len(names)
    return names, np.array(struct.unpack(f"<{count * len(names)}f", data)).reshape(count, len(names))


def test_the_extent_of_shown_gaussians():
    splats = cloud(degree=0)
    rotation = matrices(splats.quaternions.numpy())
    covariance = np.einsum("nij,nj,nkj->nik", rotation, splats.scales.numpy() ** 2, rotation)
    spread = np.sqrt(covariance.diagonal(axis1=1, axis2=2))
    faint = replace(splats, opacities=torch.tensor([0.01, 0.5, 0.1, 0.9, 0.09]))
    for each, shown in ((faint, [1, 2, 3]), (replace(splats, opacities=torch.full((5,), 0.01)), range(5))):
        low, high = each.extent
        means, radius = each.means.numpy()[list(shown)], spread[list(shown)]
        np.testing.assert_allclose(low, (means - radius).min(axis=0), rtol=1e-5)
        np.testing.assert_allclose(high, (means + radius).max(axis=0), rtol=1e-5)


def test_the_layout_field_by_field(tmp_path):
    splats = cloud()
    write_splats(tmp_path / "a.ply", splats)
    names, values = independent_reader(tmp_path / "a.ply")
    assert names == ORIGINAL_ORDER
    field = dict(zip(names, values.T, strict=True))
    many = lambda stem, count: np.stack([field[f"{stem}{index}"] for index in range(count)], 1)  # noqa: E731
    np.testing.assert_allclose(np.stack([field[k] for k in "xyz"], 1), to_y_up(splats.means.numpy()), atol=1e-6)
    assert (np.stack([field[k] for k in ("nx", "ny", "nz")]) == 0).all()
    np.testing.assert_allclose(0.5 + 0.28209479177387814 * many("f_dc_", 3), splats.colors.numpy(), atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-field["opacity"])), splats.opacities.numpy(), atol=1e-6)
    np.testing.assert_allclose(np.exp(many("scale_", 3)), splats.scales.numpy(), rtol=1e-5)
    # Each Gaussian's own axes, as columns, in the file's world.
    axes = matrices(many("rot_", 4))
    expected = np.stack([to_y_up(columns) for columns in np.moveaxis(matrices(splats.quaternions.numpy()), 2, 0)], 2)
    np.testing.assert_allclose(axes, expected, atol=1e-5)
    # The file's colour in the file's direction is ours in ours; f_rest_* run over the coefficients of red first.
    direction = torch.nn.functional.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(1)), dim=-1)
    there = harmonics(torch.from_numpy(to_y_up(direction.numpy())), 3)[:, 1:].numpy()
    here = torch.einsum("dk,nkc->dnc", harmonics(direction, 3)[:, 1:], splats.harmonics).numpy()
    np.testing.assert_allclose(np.einsum("dk,nck->dnc", there, many("f_rest_", 45).reshape(-1, 3, 15)), here, atol=1e-5)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_reading_gives_back_what_was_written(tmp_path, degree):
    splats = cloud(degree=degree)
    write_splats(tmp_path / "a.ply", splats)
    again = read_splats(tmp_path / "a.ply")
    for name in ("means", "scales", "opacities", "colors"):
        torch.testing.assert_close(getattr(again, name), getattr(splats, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        matrices(again.quaternions.numpy()), matrices(splats.quaternions.numpy()), atol=1e-5, rtol=0
    )
    if degree == 0:
        assert again.harmonics is None
    else:
        torch.testing.assert_close(again.harmonics, splats.harmonics, atol=1e-5, rtol=1e-5)


def test_trimesh_finds_the_points(tmp_path):
    import trimesh

    splats = cloud(degree=0)
    write_splats(tmp_path / "a.ply", splats)
    np.testing.assert_allclose(trimesh.load(tmp_path / "a.ply").vertices, to_y_up(splats.means.numpy()), atol=1e-6)


def test_certain_gaussians_stay_finite(tmp_path):
    splats = cloud(2, degree=0)
    splats.opacities[0], splats.opacities[1] = 0.0, 1.0
    write_splats(tmp_path / "a.ply", splats)
    torch.testing.assert_close(read_splats(tmp_path / "a.ply").opacities, splats.opacities, atol=1e-5, rtol=0)


def test_harmonics_of_no_degree_are_refused(tmp_path):
    splats = cloud(2, degree=1)
    odd = Splats(
        splats.means, splats.scales, splats.quaternions, splats.opacities, splats.colors, splats.harmonics[:, :2]
    )
    with pytest.raises(ValueError, match="3, 8 or 15 coefficients per channel, got 2"):
        write_splats(tmp_path / "a.ply", odd)


def test_quaternion_product_is_the_product_of_rotations():
    left, right = cloud(6, seed=1).quaternions, cloud(6, seed=2).quaternions
    both = matrices(quaternion_product(left, right).numpy())
    np.testing.assert_allclose(both, matrices(left.numpy()) @ matrices(right.numpy()), atol=1e-5)


def test_the_upward_axis_can_be_told(tmp_path):
    splats = cloud(degree=0)
    write_splats(tmp_path / "a.ply", splats)
    as_it_is = read_splats(tmp_path / "a.ply", up="z")
    np.testing.assert_allclose(as_it_is.means.numpy(), to_y_up(splats.means.numpy()), atol=1e-6)


def points_file(
    path: Path, body: bytes, properties: str, count: int = 2, kind: str = "ascii", comment: str = ""
) -> Path:
    header = f"ply\nformat {kind} 1.0\n{comment}element vertex {count}\n{properties}end_header\n"
    path.write_bytes(header.encode() + body)
    return path


XYZ = "property float x\nproperty float y\nproperty float z\n"
RGB = "property uchar red\nproperty uchar green\nproperty uchar blue\n"


def test_point_clouds_as_text_and_binary(tmp_path):
    text = points_file(tmp_path / "a.ply", b"1 2 3 255 0 51\n4 5 6 0 0 0\n", XYZ + RGB)
    points, colors = read_points(text)
    torch.testing.assert_close(points, torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    torch.testing.assert_close(colors, torch.tensor([[1.0, 0, 0.2], [0, 0, 0]]))
    body = b"".join(struct.pack(">fff", *row) for row in ((1, 2, 3), (4, 5, 6)))
    big = points_file(tmp_path / "b.ply", body, XYZ, kind="binary_big_endian", comment="comment Y up\n")
    points, colors = read_points(big)
    torch.testing.assert_close(points, torch.tensor([[3.0, 1, 2], [6, 4, 5]]))
    assert colors is None
    splats = cloud(degree=1)
    write_splats(tmp_path / "c.ply", splats)
    points, colors = read_points(tmp_path / "c.ply")
    torch.testing.assert_close(points, splats.means, atol=1e-6, rtol=0)
    torch.testing.assert_close(colors, splats.colors, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("body", "properties", "options", "said"),
    [
        (b"1 2 3\n", XYZ, {}, "truncated or damaged: it must have 2 lines of 3 numbers"),
        (b"1 2 x\n1 2 3\n", XYZ, {}, "some of its data are not numbers"),
        (b"1 2 nan\n1 2 3\n", XYZ, {}, "some values of x, y, z are not finite"),
        (b"1 2\n1 2\n", "property float x\nproperty float y\n", {}, "lack the property z"),
        (b"", XYZ, {"kind": "binary_little_endian", "count": 10**12}, "is truncated: 1000000000000 points need"),
        (b"", XYZ, {"kind": "binary_middle_endian"}, "is not valid PLY"),
        (b"", XYZ + "property list uchar int z2\n", {}, "is not a scalar of a known type"),
        (b"", XYZ + "property float x\n", {}, "two properties with the same name"),
        (b"", "", {}, "have no properties"),
        (b"", XYZ, {"count": "many"}, "is not valid PLY"),
    ],
)
def test_damaged_files_are_told_in_a_sentence(tmp_path, body, properties, options, said):
    path = points_file(tmp_path / "bad.ply", body, properties, **options)
    with pytest.raises(ValueError, match=said) as error:
        read_points(path)
    assert "\n" not in str(error.value) and "bad.ply" in str(error.value)


def test_files_that_are_no_gaussians(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_splats(tmp_path / "none.ply")
    (tmp_path / "a.ply").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="is not a PLY file"):
        read_splats(tmp_path / "a.ply")
    plain = points_file(tmp_path / "b.ply", b"1 2 3\n4 5 6\n", XYZ)
    with pytest.raises(ValueError, match="lack the property f_dc_0"):
        read_splats(plain)
    odd = points_file(tmp_path / "c.ply", b"1\n1\n", "property float f_rest_0\n")
    with pytest.raises(ValueError, match="must be 0, 9, 24 or 45, got 1"):
        read_splats(odd)
    write_splats(tmp_path / "d.ply", cloud(2, degree=0))
    raw = bytearray((tmp_path / "d.ply").read_bytes())
    raw[-16:] = bytes(16)  # the last rotation
    (tmp_path / "d.ply").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a quaternion \(rot_0 to rot_3\) is zero"):
        read_splats(tmp_path / "d.ply")
