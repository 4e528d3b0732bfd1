"""Safe loading of pickled tensors (``.ckpt``, ``.pt``, ``.bin``).

``torch.load`` with ``weights_only=True`` executes no code, but it decompresses whatever the file contains, it creates a
few other objects than tensors, and it accepts tensors that are larger than their data. Such files are rejected here.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from scoredist3d.limits import MAX_PICKLE_BYTES

LOADING_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, MemoryError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError),
)
"""What :func:`load_tensors` raises for damaged files, besides its own ``ValueError``."""

_NAMES = re.compile(
    r"torch\.(?:Size|device|nn\.parameter\.Parameter|(?:b?float|complex|u?int|bool)\w*|"
    r"_utils\._rebuild_(?:tensor_v[23]|parameter))|_codecs\.encode"
)
"""Classes and functions, besides ``OrderedDict`` and ``set``, that a pickle of tensors and plain values refers to."""
_ELEMENT_SIZES = {
    **{f"{name}Storage": 1 for name in ("Untyped", "Byte", "Char", "Bool")},
    **{f"{name}Storage": 2 for name in ("Half", "BFloat16", "Short")},
    **{f"{name}Storage": 4 for name in ("Float", "Int")},
    **{f"{name}Storage": 8 for name in ("Double", "Long", "ComplexFloat")},
    "ComplexDoubleStorage": 16,
}
"""Bytes per element of the data of tensors, by the name that stands for their type in a pickle."""
_END, _END_64, _LOCATOR_64 = 22, 76, 20
"""Bytes of the last record of a zip archive, of the two records before it that large archives have, and of the second
of these."""
_PLAIN: dict[str, type] = {"collections.OrderedDict": OrderedDict, "builtins.set": set, "__builtin__.set": set}


def load_tensors(path: Path, *, mmap: bool = False) -> Any:
    """The content of a file of ``torch.save``, which may be tensors, plain values, and containers of these; on the CPU.

    Args:
        path: The file.
        mmap: Leave the tensors on disk until they are used.

    Raises:
        ValueError: The file is not such a file, contains something else, or has tensors that are larger than their
            data. A damaged file may also raise one of :data:`LOADING_ERRORS`.
    """
    check_tensor_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def check_tensor_file(path: Path) -> None:
    """Check the archive of a file of ``torch.save`` and the names and sizes in its pickle, without loading tensors.

    Raises:
        ValueError: The archive is compressed or larger than the file, the pickle refers to other objects than tensors
            and plain values, or a tensor is larger than its data. A damaged file may also raise one of
            :data:`LOADING_ERRORS`.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_layout(path, entries)
        # torch.save stores its entries uncompressed and one after the other, so they cannot be larger than the file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its zip archive is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("the entries of its zip archive are larger than the file")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its zip archive must contain one data.pkl of at most {MAX_PICKLE_BYTES:,} bytes")
        inspector = _Inspector(archive.read(pickles[0]))
        inspector.load()
        folder = pickles[0].filename.removesuffix("data.pkl")
        present = {entry.filename: entry.file_size for entry in entries}
        for key, size in inspector.storages.items():
            if size > present.get(f"{folder}data/{key}", -1):
                raise ValueError(f"the data of a tensor are incomplete: {folder}data/{key} should have {size:,} bytes")


def _check_layout(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Check that Python and torch read the same archive.

    A file that does not begin with an entry is another format to torch. Where the table of entries does not directly
    precede the records at the end, Python moves all positions, and torch does not. Of entries whose names differ in
    case at most, they choose different ones.

    Raises:
        ValueError: The archive is not arranged as ``torch.save`` and ``zipfile`` do it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, size - _END_64 - _END))
        end = file.read()
    records = end[-_END:]
    length, position = struct.unpack("<II", records[12:20])
    expected = size - _END
    if len(end) == _END_64 + _END and end[_END_64 - _LOCATOR_64 :].startswith(b"PK\6\7"):
        length, position = struct.unpack("<QQ", end[40:56])
        expected -= _END_64
        if not end.startswith(b"PK\6\6") or struct.unpack("<Q", end[64:72]) != (expected,):
            raise ValueError("the records at the end of its zip archive are damaged")
    if start != b"PK\3\4" or not records.startswith(b"PK\5\6") or position + length != expected:
        raise ValueError("it contains something else before, in or after its zip archive")
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        raise ValueError("its zip archive has two entries of the same name")


class _Inspector(pickle._Unpickler):  # in Python; the memo of pickle.Unpickler can be made to need any amount of memory
    """Reader of a pickle that creates only containers and plain values, and records the sizes of the tensors' data.

    No class or function of the pickle is imported: every name is either rejected or replaced by a function that at most
    checks its arguments.

    Attributes:
        storages: Number of bytes that the pickle declares for the data of tensors, by name.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A replacement for a class or function; for a type of tensor data, the number of bytes per element."""
        full = f"{module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if full.startswith("torch.") and name in _ELEMENT_SIZES:
            return _ELEMENT_SIZES[name]
        if not _NAMES.fullmatch(full):
            raise ValueError(f"it contains {full}, which is neither a tensor nor a plain value")
        return _check_shape if name.startswith("_rebuild_tensor") else _nothing

    def persistent_load(self, pid: Any) -> int:
        """Record the size of ``("storage", type, name, device, number of elements)``; returns the number."""
        _, element_size, name, _, count = pid
        size = int(element_size) * int(count)
        if size < 0:
            raise ValueError("it declares tensor data of negative size")
        self.storages[str(name)] = max(size, self.storages.get(str(name), 0))
        return int(count)


def _check_shape(count: int, _offset: int, shape: tuple[int, ...], *_: Any) -> None:
    """Replacement for ``torch._utils._rebuild_tensor_v2``: compare a shape with the number of elements that exist.

    torch accepts strides of 0, with which a tensor of any size has a single value.

    Raises:
        ValueError: The tensor is larger than its data.
    """
    if math.prod(shape) > count:
        raise ValueError(f"it contains a tensor of shape {tuple(shape)} with only {count:,} values")


def _nothing(*_: Any) -> None:
    """Replacement for everything else."""
