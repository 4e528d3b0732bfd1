"""Common parts of the fuzzers: inputs, targets, mutations of bytes, and the loop that runs a target.

Input number i of a target depends only on the seed and i, so a failing input can be made again from the two numbers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shared.figures import counted


@dataclass(frozen=True)
class FuzzInput:
    """One hostile input: files by relative path, and command-line arguments."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the files to ``folder``, with the arguments as ``arguments.json`` if there are any."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if self.arguments:
            (folder / "arguments.json").write_text(json.dumps(self.arguments), encoding="utf-8")


@dataclass(frozen=True)
class FuzzTarget:
    """A loader under test.

    Attributes:
        make: Function that makes an input from a random generator.
        check: Function that loads an input, given a folder for its files, and returns what is wrong with the outcome;
            None if the input was loaded or refused as documented. Any exception counts as wrong.
    """

    make: Callable[[random.Random], FuzzInput]
    check: Callable[[FuzzInput, Path], str | None]


@dataclass(frozen=True)
class Finding:
    """An input with a wrong outcome."""

    number: int
    problem: str


def input_of(target: FuzzTarget, seed: int, number: int) -> FuzzInput:
    """Input ``number`` of the sequence that ``seed`` stands for."""
    return target.make(random.Random(f"{seed}/{number}"))


def run_inputs(
    target: FuzzTarget, seed: int, numbers: Iterable[int], folder: Path, begun: Callable[[int], None] = lambda _: None
) -> Iterator[Finding]:
    """Check inputs in this process; ``begun`` is called before each of them."""
    for number in numbers:
        begun(number)
        given = input_of(target, seed, number)
        try:
            problem = target.check(given, folder)
        except Exception as error:  # the kind of outcome that the fuzzer looks for
            problem = f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"
        counted("hostile inputs", problem or "")
        if problem is not None:
            yield Finding(number, problem)


INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"-1")
NUMBER_TEXTS = (b"-1", b"0", b"1", b"99999999999", b"1e999", b"nan", b"-inf", b"0x7fffffff", b"4294967296", b"")


def mutated(rng: random.Random, content: bytes) -> bytes:
    """``content`` after one to four random changes: flips, insertions, cuts, repetitions, and changes of the header."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice((_flip, _flip, _overwrite, _header, _insert, _cut, _truncate, _repeat, _number))(rng, data)
    return bytes(data)


def _place(rng: random.Random, data: bytearray) -> int:
    return rng.randrange(len(data) + 1)


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    start, value = _place(rng, data), rng.choice(INTERESTING)
    data[start : start + len(value)] = value


def _header(rng: random.Random, data: bytearray) -> None:
    start, value = rng.randrange(min(len(data), 64) + 1), rng.choice(INTERESTING)
    data[start : start + len(value)] = value


def _insert(rng: random.Random, data: bytearray) -> None:
    start = _place(rng, data)
    data[start:start] = rng.choice(
        (rng.randbytes(rng.randrange(1, 20)), rng.choice(INTERESTING) * rng.randrange(1, 50))
    )


def _cut(rng: random.Random, data: bytearray) -> None:
    start = _place(rng, data)
    del data[start : start + rng.randrange(1, 40)]


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[_place(rng, data) :]


def _repeat(rng: random.Random, data: bytearray) -> None:
    start = _place(rng, data)
    data[start:start] = bytes(data[start : start + rng.randrange(1, 60)]) * rng.randrange(1, 8)


def _number(rng: random.Random, data: bytearray) -> None:
    """Replace one run of ASCII digits, as in text formats and JSON headers."""
    starts = [i for i in range(len(data)) if 48 <= data[i] <= 57 and (i == 0 or not 48 <= data[i - 1] <= 57)]
    if not starts:
        return
    start = end = rng.choice(starts)
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    data[start:end] = rng.choice(NUMBER_TEXTS)
