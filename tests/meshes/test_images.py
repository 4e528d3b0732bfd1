"""Radiance files, written byte by byte, and 8-bit images against their known radiance."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scoredist3d.meshes.images import load_radiance

HEADER = b"#?RADIANCE\n# made by hand\nFORMAT=32-bit_rle_rgbe\n"


def write(path: Path, rows: bytes, height: int, width: int, header: bytes = HEADER) -> Path:
    path.write_bytes(header + b"\n" + f"-Y {height} +X {width}\n".encode() + rows)
    return path


def rgbe(height: int, width: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(2, 256, (height, width, 4)).astype(np.uint8)
    pixels[..., 3] = 120 + pixels[..., 3] // 16
    return pixels


def radiance(pixels: np.ndarray) -> torch.Tensor:
    exponent = pixels[..., 3:].astype(np.float64) - 136
    return torch.from_numpy((pixels[..., :3] * 2.0**exponent).astype(np.float32))


def as_runs(channel: np.ndarray) -> bytes:
    """Run-length encoding that alternates a run of four and five literal values."""
    coded, position = b"", 0
    while position < len(channel):
        if position % 9 == 0 and len(set(channel[position : position + 4])) == 1:
            count = len(channel[position : position + 4])
            coded += bytes((128 + count, channel[position]))
        else:
            plain = channel[position : position + 5]
            count = len(plain)
            coded += bytes((count, *plain))
        position += count
    return coded


def test_flat_rows(tmp_path):
    pixels = rgbe(3, 5)
    loaded = load_radiance(write(tmp_path / "flat.hdr", pixels.tobytes(), 3, 5), key="k")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, radiance(pixels), rtol=0, atol=0)


def test_run_length_rows(tmp_path):
    pixels = rgbe(4, 20)
    pixels[:, 0:4] = pixels[:, :1]
    pixels[:, 9:13] = pixels[:, 9:10]
    rows = b"".join(bytes((2, 2, 0, 20)) + b"".join(as_runs(row[:, c]) for c in range(4)) for row in pixels)
    assert len(rows) < pixels.nbytes + 4 * 4 * 5  # runs are there
    loaded = load_radiance(write(tmp_path / "runs.HDR", rows, 4, 20), key="k")
    torch.testing.assert_close(loaded, radiance(pixels), rtol=0, atol=0)


def test_known_pixel_zero_exponent_and_exposure(tmp_path):
    """(128, 64, 32) with exponent 129 is (1, 1/2, 1/4) times 2; exponent 0 is black."""
    pixels = bytes((128, 64, 32, 129, 9, 9, 9, 0))
    header = HEADER + b"EXPOSURE=4\nEXPOSURE= 0.5\n"
    for head, scale in ((HEADER, 1.0), (header, 0.5)):
        loaded = load_radiance(write(tmp_path / "a.hdr", pixels, 1, 2, head), key="k")
        assert (loaded / scale).tolist() == [[[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]]]


def test_display_images_become_linear(tmp_path):
    pixels = np.array([[[0, 128, 255], [10, 64, 200]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_radiance(tmp_path / "a.png", key="k")
    expected = torch.tensor([[[0.0, 0.2158605, 1.0], [0.0030353, 0.0512695, 0.5775804]]])
    torch.testing.assert_close(loaded, expected, atol=1e-6, rtol=0)
    Image.fromarray(pixels[..., 1]).save(tmp_path / "gray.png")
    gray = load_radiance(tmp_path / "gray.png", key="k")
    torch.testing.assert_close(gray, expected[..., 1:2].expand(1, 2, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.exr", b"v/1", "k: cannot read .*a.exr: .exr is not supported; convert it to .hdr"),
        ("noname", b"", "a file without a suffix is not supported"),
        ("a.png", b"no picture", "k: cannot read .*a.png"),
        ("a.hdr", b"P6\n\n", "has no Radiance header"),
        ("b.hdr", HEADER.replace(b"rgbe", b"xyze") + b"\n-Y 1 +X 1\n0000", "its pixel format is 32-bit_rle_xyze"),
        ("c.hdr", HEADER + b"\n+Y 1 +X 1\n0000", "only '-Y height .X width' is supported"),
        ("d.hdr", HEADER + b"\n-Y 2 +X 2\n0000", "pixel data is truncated"),
        ("e.hdr", HEADER + b"\n-Y 1 +X 8\n" + bytes((2, 2, 0, 8, 130, 7)), "pixel data is truncated"),
        ("f.hdr", HEADER + b"\n-Y 1 +X 8\n" + bytes((2, 2, 0, 8, 137, 7)), "a row is longer"),
        ("g.hdr", HEADER + b"\n-Y 1 +X 8\n" + bytes((2, 2, 0, 8, 0, 7)), "a run of length 0"),
        ("h.hdr", HEADER + b"\n-Y 1 +X 2\n" + bytes((5, 5, 5, 128, 1, 1, 1, 1)), "before 1991"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_radiance(tmp_path / name, key="k")


def test_a_missing_file_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"material.map: there is no file {tmp_path / 'x.hdr'}")):
        load_radiance(tmp_path / "x.hdr", key="material.map")
