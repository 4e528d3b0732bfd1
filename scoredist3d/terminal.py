"""Text output to terminals and pipes of any encoding and width."""

from __future__ import annotations

import errno
import os
import sys
import unicodedata
from typing import TextIO


def tolerate_any_text() -> None:
    """Make stdout and stderr print characters outside their encoding as escapes (``\\u00e9``) instead of failing.

    A prompt may contain any character, but a pipe or an old terminal may accept only ASCII.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def print_out(text: str, end: str = "\n", stream: TextIO | None = None) -> bool:
    """Print and flush, to stdout by default; False if the reader is gone (``| head``, or a closed terminal)."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # Python flushes the stream again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def display_width(text: str) -> int:
    """Width of ``text`` in terminal columns: two for wide East Asian characters, none for combining marks."""
    return sum(map(_columns, text))


def fit_width(text: str, columns: int) -> str:
    """``text`` truncated to at most ``columns`` columns."""
    width = 0
    for index, character in enumerate(text):
        width += _columns(character)
        if width > columns:
            return text[:index]
    return text


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
