"""Pickled tensors from others: decompression bombs, sizes that the data do not have, and other objects than tensors."""

from __future__ import annotations

import copy
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoredist3d import tensor_files
from scoredist3d.tensor_files import load_tensors
from scoredist3d.training.checkpoint import FORMAT, MARKER, checkpoint_step, read_checkpoint, write_checkpoint


def repacked(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """The archive of ``torch.save``, written again with changed entries."""
    with zipfile.ZipFile(path) as archive:
        content = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content:
            archive.writestr(name, change(name, data))
    return path


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_all_plain_values_are_read(tmp_path: Path) -> None:
    weights = torch.arange(6.0).view(2, 3)
    types = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.complex64)
    content = {
        "state_dict": OrderedDict(a=weights, b=weights.T, shared=weights[1:]),
        "parameter": torch.nn.Parameter(weights.clone()),
        "types": [weights.to(dtype) for dtype in types],
        "plain": {
            "n": None,
            "t": (1, 2.5, "x", True),
            "big": 2**70,
            "set": {1},
            "bytes": b"\xff",
            "dtype": torch.float16,
        },
        "empty": torch.zeros(0, 3),
    }
    for mmap in (False, True):
        read = load_tensors(saved(tmp_path / "all.ckpt", content), mmap=mmap)
        assert read["plain"] == content["plain"]
        torch.testing.assert_close(read["state_dict"], content["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(read["types"], content["types"], rtol=0, atol=0)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = repacked(saved(tmp_path / "a.ckpt", torch.zeros(10**6)), lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="its zip archive is compressed"):
        load_tensors(path)


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    """Every entry of the central directory points to the same data, so that the sum exceeds the file."""
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/0", bytes(10_000))
        for index in range(1, 10):
            entry = copy.copy(archive.filelist[0])
            entry.filename = f"a/data/{index}"
            archive.filelist.append(entry)
    with pytest.raises(ValueError, match="larger than the file"):
        load_tensors(path)


def split(archive: bytes) -> tuple[bytes, bytes]:
    """The entries and the table of entries of an archive of ``zipfile``."""
    length, position = struct.unpack("<II", archive[-10:-2])
    return archive[:position], archive[position : position + length]


def with_two_tables(first: bytes, second: bytes) -> bytes:
    """An archive in which torch finds the entries of ``first`` and Python those of ``second``, which have equal names.

    The last record has the position of the first table, but Python takes the one before this record.
    """
    (entries, table), (other_entries, other_table) = split(first), split(second)
    entries += bytes(max(0, len(other_entries) - len(entries)))
    moved, start = bytearray(other_table), 0
    while start < len(moved):
        (position,) = struct.unpack_from("<I", moved, start + 42)
        struct.pack_into("<I", moved, start + 42, position + len(entries) - len(other_entries))
        start += 46 + sum(struct.unpack_from("<HHH", moved, start + 28))
    end = first[-22:-10] + struct.pack("<IIH", len(table), len(entries), 0)
    return entries + table + other_entries + bytes(moved) + end


def test_torch_and_the_check_read_the_same_archive(tmp_path: Path) -> None:
    def plain(name: str, content: Any) -> bytes:
        return repacked(saved(tmp_path / name, content), lambda _, data: data).read_bytes()

    small, large = {"x": torch.zeros(4)}, {"x": torch.zeros(1).expand(10**6)}
    good = plain("a.ckpt", small)
    path = tmp_path / "a.ckpt"
    assert load_tensors(path)["x"].shape == (4,)
    legacy = tmp_path / "legacy"
    torch.save(large, legacy, _use_new_zipfile_serialization=False)
    (tmp_path / "other").mkdir()
    hidden = repacked(saved(tmp_path / "other" / "a.ckpt", large), lambda _, data: data).read_bytes()
    files = {"before": legacy.read_bytes() + good, "two": with_two_tables(hidden, good), "after": good + b"more"}
    files["comment"] = good[:-2] + b"\4\0more"
    for data in files.values():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"something else before, in or after its zip archive"):
            load_tensors(path)
    path.write_bytes(files["two"])
    assert torch.load(path, weights_only=True)["x"].shape == (10**6,)  # what the check must not miss


def test_records_at_the_end_agree(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", {"x": torch.zeros(4)})  # torch writes the records of large archives
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, len(data) - 34, 0)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the records at the end of its zip archive are damaged"):
        load_tensors(path)


@pytest.mark.parametrize("name", ["data/0", "DATA/0", "DATA.PKL"])
def test_names_of_entries_are_unique_whatever_their_case(tmp_path: Path, name: str) -> None:
    path = repacked(saved(tmp_path / "a.ckpt", {"x": torch.zeros(4)}), lambda _, data: data)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(f"a/{name}", bytes(16))
    with pytest.raises(ValueError, match="two entries of the same name"):
        load_tensors(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_declared_sizes_are_compared_with_the_data(tmp_path: Path, mmap: bool) -> None:
    with pytest.raises(ValueError, match=r"shape \(1000000000000,\) with only 1 values"):
        load_tensors(saved(tmp_path / "expanded.ckpt", {"x": [torch.zeros(1).expand(10**12)]}), mmap=mmap)
    short = repacked(
        saved(tmp_path / "short.ckpt", {"x": torch.zeros(4)}), lambda name, data: data[:4] if "data/0" in name else data
    )
    with pytest.raises(ValueError, match=r"incomplete: short/data/0 should have 16 bytes"):
        load_tensors(short, mmap=mmap)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(bytearray, 10**9), "bytearray"),
        (Call(torch.Tensor, 10**6), "torch.Tensor"),
        (torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (10**12,), check_invariants=True), "sparse"),
        (Call(print, "called"), "print"),
    ],
)
def test_other_objects_are_refused_before_they_are_created(
    tmp_path: Path, value: Any, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.ckpt", {"x": value})
    monkeypatch.setattr(torch, "load", pytest.fail)
    with pytest.raises(ValueError, match=f"contains .*{name}.*, which is neither a tensor nor a plain value"):
        load_tensors(path)
    assert capsys.readouterr().out == ""


def test_a_large_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "MAX_PICKLE_BYTES", 1000)
    assert load_tensors(saved(tmp_path / "a.ckpt", {"x": "y" * 800})) == {"x": "y" * 800}
    with pytest.raises(ValueError, match=r"one data\.pkl of at most 1,000 bytes"):
        load_tensors(saved(tmp_path / "a.ckpt", {"x": "y" * 1000}))


def test_a_memo_of_any_size_needs_no_memory(tmp_path: Path) -> None:
    """The index of a memo entry is 32 bits, for which pickle.Unpickler allocates an array."""
    path = saved(tmp_path / "a.ckpt", {"x": "y"})
    repacked(path, lambda name, data: data[:-1] + b"r\xff\xff\xff\xff." if name.endswith("data.pkl") else data)
    assert load_tensors(path) == {"x": "y"}


def test_containers_that_are_shared_many_times_are_visited_once(tmp_path: Path) -> None:
    nested: list[Any] = [torch.zeros(1)]
    for _ in range(100):
        nested = [nested, nested]  # 2^100 paths to one tensor
    assert len(load_tensors(saved(tmp_path / "a.ckpt", nested))) == 2


def test_a_checkpoint_names_the_reason_and_its_neighbors(tmp_path: Path) -> None:
    write_checkpoint({"step": 1, "x": torch.zeros(3)}, tmp_path / "step-000010.ckpt")
    assert read_checkpoint(tmp_path / "step-000010.ckpt", mmap=True)["step"] == 1
    bad = saved(tmp_path / "last.ckpt", {MARKER: {"format": FORMAT}, "x": torch.zeros(1).expand(10**9)})
    with pytest.raises(
        ValueError, match=r"last\.ckpt is damaged .*\(it contains a tensor .*another checkpoint.*000010"
    ):
        read_checkpoint(bad)


@pytest.mark.parametrize("content", [{}, {"global_step": "5"}])
def test_a_checkpoint_without_a_number_of_steps_is_damaged(tmp_path: Path, content: dict[str, Any]) -> None:
    write_checkpoint(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="damaged: it has no number of steps"):
        checkpoint_step(tmp_path / "last.ckpt")
