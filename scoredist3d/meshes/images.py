"""Loading of environment images: Radiance .hdr files and the formats that Pillow reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoredist3d.config import FieldError
from scoredist3d.limits import MAX_IMAGE_BYTES, check_file_size
from scoredist3d.meshes.image_files import check_image_size, decode_image
from scoredist3d.ops.shading.color import srgb_to_linear

_UNCHECKED = 2**20  # pixels of an image that is small even if its header is wrong
_DISPLAY_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def load_radiance(path: str | Path, *, key: str) -> Tensor:
    """Linear radiance (H, W, 3) float32 of an image file, top row first; 8-bit images are decoded as display sRGB.

    Args:
        path: A ``.hdr`` file (Radiance RGBE, run-length encoded or flat) or an 8-bit image.
        key: Config key of the file, for error messages.

    Raises:
        ValueError: The file does not exist, has an unsupported format, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FieldError(f"there is no file {path}; give the path of a .hdr or .png image", key)
    suffix = path.suffix.lower()
    if suffix == ".hdr":
        try:
            check_file_size(path, MAX_IMAGE_BYTES, "an image")
            pixels = _decode_hdr(path.read_bytes())
        except (ValueError, OSError) as error:
            raise FieldError(f"cannot read {path}: {error}", key) from None
        return torch.from_numpy(pixels)
    if suffix not in _DISPLAY_SUFFIXES:
        raise FieldError(
            f"cannot read {path}: {suffix or 'a file without a suffix'} is not supported; convert it to .hdr", key
        )
    return _load_display(path, key)


def _load_display(path: Path, key: str) -> Tensor:
    try:
        pixels = np.array(decode_image(path, "RGB"), dtype=np.float32)
    except (ValueError, OSError) as error:
        raise FieldError(f"cannot read {path}: {error}", key) from None
    return srgb_to_linear(torch.from_numpy(pixels) / 255.0)


def _decode_hdr(data: bytes) -> np.ndarray:
    """Radiance (H, W, 3) float32 from .hdr file contents: mantissa * 2^(exponent - 136) / product of exposures."""
    header, separator, body = data.partition(b"\n\n")
    lines = header.decode("ascii", "replace").split("\n")
    if not separator or not lines[0].startswith(("#?RADIANCE", "#?RGBE")):
        raise ValueError("it has no Radiance header")
    settings = [line.split("=", 1) for line in lines[1:] if "=" in line and not line.startswith("#")]
    formats = [value.strip() for name, value in settings if name == "FORMAT"]
    if formats and formats[-1] != "32-bit_rle_rgbe":
        raise ValueError(f"its pixel format is {formats[-1]}; only 32-bit_rle_rgbe is supported")
    exposure = float(np.prod([float(value) for name, value in settings if name == "EXPOSURE"]))
    if not 0 < exposure < np.inf:
        raise ValueError(f"its exposure is {exposure:g}, which is not a positive number")
    size, _, pixels = body.partition(b"\n")
    words = size.split()
    if len(words) != 4 or words[0] != b"-Y" or words[2] != b"+X":
        raise ValueError(f"its resolution line is {size[:40]!r}; only '-Y height +X width' is supported")
    height, width = int(words[1]), int(words[3])
    check_image_size(width, height)
    rgbe = _decode_rows(pixels, height, width).astype(np.int32)
    scale = np.ldexp(1.0, rgbe[..., 3:] - 136) * (rgbe[..., 3:] > 0)
    radiance = rgbe[..., :3] * scale / exposure
    if radiance.max() > np.finfo(np.float32).max:
        raise ValueError("some of its pixels are infinite; correct its EXPOSURE or save it again")
    return radiance.astype(np.float32)


def _decode_rows(data: bytes, height: int, width: int) -> np.ndarray:
    """RGBE pixels (H, W, 4) uint8.

    Each row is either flat, or starts with 2, 2 and its width, followed by the runs of each channel.
    """
    # Runs have up to 127 pixels, so a header that declares more pixels than the data can hold is found before.
    least = 4 + 8 * -(-width // 127) if 8 <= width < 32768 else 4 * width
    if height * width > _UNCHECKED and len(data) < height * min(least, 4 * width):
        raise ValueError("the pixel data is truncated")
    rows = np.empty((height, width, 4), dtype=np.uint8)
    marker = bytes((2, 2, width >> 8, width & 255)) if 8 <= width < 32768 else None
    position = 0
    for row in rows:
        if marker is not None and data[position : position + 4] == marker:
            position += 4
            for channel in range(4):
                row[:, channel], position = _decode_runs(data, position, width)
            continue
        flat = data[position : position + 4 * width]
        if len(flat) != 4 * width:
            raise ValueError("the pixel data is truncated")
        row[:] = np.frombuffer(flat, dtype=np.uint8).reshape(width, 4)
        if (row[:, :3] == 1).all(axis=1).any():
            raise ValueError(
                "it uses the obsolete run-length encoding from before 1991; save it again with another program"
            )
        position += 4 * width
    return rows


def _decode_runs(data: bytes, position: int, width: int) -> tuple[np.ndarray, int]:
    """Values (W,) of one channel of a row, and the position after them."""
    values = bytearray()
    while len(values) < width:
        if position + 1 >= len(data):
            raise ValueError("the pixel data is truncated")
        count = data[position]
        if count > 128:
            values += data[position + 1 : position + 2] * (count - 128)
            position += 2
        else:
            values += data[position + 1 : position + 1 + count]
            position += 1 + count
        if count == 0:
            raise ValueError("a row has a run of length 0")
    if len(values) != width:
        raise ValueError("a row is longer than the image is wide")
    return np.frombuffer(bytes(values), dtype=np.uint8), position
