"""Decoding of image files from others: a fixed list of formats, and a limit on the size before any pixel is decoded."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image

from scoredist3d.limits import MAX_IMAGE_BYTES, MAX_IMAGE_SIDE, check_file_size

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "TGA")
"""Formats that are decoded. Pillow goes by the content of a file, and would start Ghostscript for EPS."""
_pillow_open = Image.open


def decode_image(source: Path | bytes, mode: str) -> Image.Image:
    """The image in a file, converted to a mode of Pillow, e.g. ``RGB``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is too large, damaged, or not an image in one of :data:`FORMATS`.
    """
    if isinstance(source, Path):
        check_file_size(source, MAX_IMAGE_BYTES, "an image")
    with open_image(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return converted_image(image, mode)


def open_image(source: str | Path | IO[bytes]) -> Image.Image:
    """An image whose header has been read and checked, and whose pixels have not been decoded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The image is too large, or not in one of :data:`FORMATS`.
    """
    try:
        with _no_pixel_limit():
            image = _pillow_open(source, formats=FORMATS)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise many types of exceptions
        raise ValueError(f"it is not an image of a supported format ({', '.join(FORMATS)})") from error
    try:
        check_image_size(*image.size)
    except ValueError:
        image.close()
        raise
    return image


def converted_image(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image that is open, and convert it to a mode of Pillow.

    Raises:
        ValueError: The image is too large or damaged.
    """
    check_image_size(*image.size)
    try:
        with _no_pixel_limit():
            return image.convert(mode)
    except Exception as error:  # as above
        raise ValueError(f"it is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def check_image_size(width: int, height: int) -> None:
    """Check the size that the header of an image declares.

    Raises:
        ValueError: A side is larger than :data:`~scoredist3d.limits.MAX_IMAGE_SIDE`, or the image is empty.
    """
    if not 0 < min(width, height) <= max(width, height) <= MAX_IMAGE_SIDE:
        raise ValueError(
            f"its size is {width} x {height} pixels, but an image must have at least 1 x 1 and at most "
            f"{MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE}"
        )


@contextmanager
def checked_image_opening(report: Callable[[str], None]) -> Iterator[None]:
    """Let other libraries open images by :func:`open_image` instead of ``PIL.Image.open``.

    Args:
        report: Called with the reason whenever an image is rejected, since libraries ignore the exception.
    """

    def replacement(source: Any, *_: Any, **__: Any) -> Image.Image:
        try:
            return open_image(source)
        except ValueError as error:
            report(str(error))
            raise

    setattr(Image, "open", replacement)  # noqa: B010 - its type has more parameters than are used
    try:
        yield
    finally:
        Image.open = _pillow_open


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Switch off Pillow's own limit, at which it only warns; :func:`check_image_size` replaces it."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
