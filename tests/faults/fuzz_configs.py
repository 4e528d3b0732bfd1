"""Fuzzer of configurations: mutated recipes and hostile overrides, run through the command line with ``--dry-run``.

An input is either a valid configuration, or it gives one error message: exit code 2 and at most 500 characters without
tracebacks, names of internals or memory addresses.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import re
import warnings
from functools import cache
from pathlib import Path

from faults.fuzzing import FuzzInput, FuzzTarget
from faults.hostile_yaml import LINES, OVERRIDES, VALUES

from scoredist3d import cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LONGEST_MESSAGE = 500
INTERNALS = re.compile(
    r"Traceback|\bat 0x[0-9a-f]|object at |<class|<function|NoneType|__\w+__|DictConfig|ListConfig|AnyNode|"
    r"[Oo]mega[Cc]onf|"
    r"full_key|object_type|reference_type|constructor|recursion|\b(?!Config)[A-Z]\w+(?:Error|Exception|Warning)\b|"
    r"MappingNode|ScalarNode|SequenceNode|tag:yaml|\berrno\b|codec can't|surrogate|4300|not subscriptable|"
    r"unhashable|has no attribute|positional argument|unexpected keyword"
)

PLAIN_VALUES = ("0", "1", "2", "0.5", "100", "1e-3", "true", "false", "null", "[0, 1]", "{from: 1, to: 0.5, end: 5}")
"""Values that many keys accept, so that a part of the inputs is valid and reaches later checks."""


@cache
def recipes() -> dict[str, str]:
    """Text of each shipped YAML file, by path relative to ``configs/``, with includes relative to that folder.

    Inputs lie in another folder, from which ``../recipe/x.yaml`` would not be found.
    """
    paths = sorted(CONFIGS.rglob("*.yaml"))
    return {str(path.relative_to(CONFIGS)): path.read_text(encoding="utf-8").replace("../", "") for path in paths}


def make(rng: random.Random) -> FuzzInput:
    """A shipped recipe with mutations of its text, of overrides, or of both."""
    name = rng.choice(list(recipes()))
    text, overrides = recipes()[name], ["prompt=a red mug"] if rng.random() < 0.9 else []
    kind = rng.random()
    if kind < 0.7:
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            text = rng.choice((_value, _value, _value, _line, _line, _characters, _drop, _double, _indent, _splice))(
                rng, text
            )
    if kind > 0.6:
        overrides += [_override(rng, text) for _ in range(rng.choice((1, 1, 2)))]
    content = text.encode("utf-8", errors="surrogatepass")
    if rng.random() < 0.08:
        content = _bytes(rng, content)
    return FuzzInput({"config.yaml": content}, tuple(overrides))


def check(given: FuzzInput, folder: Path) -> str | None:
    """What is wrong with the outcome of a dry run; None for a valid configuration and for a proper message."""
    given.write(folder)
    # A path next to the shipped recipes is not written to; includes are found in configs/ of the package.
    out, err = io.StringIO(), io.StringIO()
    arguments = ["--config", str(folder / "config.yaml"), "--train", "--dry-run", *given.arguments]
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")
            code = cli.main(arguments)
    finally:
        logging.disable(logging.NOTSET)
    return problem_with(code, err.getvalue(), out.getvalue(), folder)


def problem_with(code: int, err: str, out: str, folder: Path) -> str | None:
    """What is wrong with exit code and output of the command line; None if nothing is."""
    if code == cli.OK:
        return None if out and "error:" not in err else f"success without a configuration: {err[:200]!r}"
    message = err.strip()
    if code != cli.USAGE_ERROR or not message.startswith("error: "):
        return f"exit code {code}: {message[:300]!r}"
    message = message.removeprefix("error: ").replace(f"{folder}{os.sep}", "")
    if not message:
        return "an empty message"
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message)} characters: {message[:300]!r}"
    if any(not (character.isprintable() or character == "\n") for character in message):
        return f"unprintable characters: {message[:300]!r}"
    internal = INTERNALS.search(message)
    return f"internal text {internal[0]!r}: {message!r}" if internal else None


def _value(rng: random.Random, text: str) -> str:
    """Replace the value of one key."""
    found = list(re.finditer(r"(?<=: )[^,{}\[\]\n#]+|(?<=: )[{\[][^\n]*", text))
    if not found:
        return _line(rng, text)
    place, value = rng.choice(found), rng.choice(VALUES if rng.random() < 0.5 else PLAIN_VALUES)
    return text[: place.start()] + value + text[place.end() :]


def _line(rng: random.Random, text: str) -> str:
    """Insert a line at the top level, or inside of a block."""
    lines = text.splitlines()
    at = rng.randrange(len(lines) + 1)
    line = rng.choice(LINES) if rng.random() < 0.8 else f"{rng.choice(('a', 'type', 'b c', '5'))}: {rng.choice(VALUES)}"
    return "\n".join([*lines[:at], rng.choice(("", "", "  ", "    ")) + line, *lines[at:]]) + "\n"


def _characters(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    alphabet = "{}[]:,-?*&!|>%@`'\"#\t\n $.\\\x00\x1b\ufeff\u2028\u0661e0"
    return text[:at] + "".join(rng.choices(alphabet, k=rng.randrange(1, 4))) + text[at + rng.randrange(3) :]


def _drop(rng: random.Random, text: str) -> str:
    lines = text.splitlines()
    start = rng.randrange(len(lines) + 1)
    return "\n".join([*lines[:start], *lines[start + rng.randrange(1, 4) :]]) + "\n"


def _double(rng: random.Random, text: str) -> str:
    lines = text.splitlines() or [""]
    at = rng.randrange(len(lines))
    return "\n".join([*lines[:at], *([lines[at]] * rng.choice((2, 3, 50))), *lines[at + 1 :]]) + "\n"


def _indent(rng: random.Random, text: str) -> str:
    lines = text.splitlines() or [""]
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((" ", "  ", "\t", "- ")) + lines[at] if rng.random() < 0.7 else lines[at].lstrip()
    return "\n".join(lines) + "\n"


def _splice(rng: random.Random, text: str) -> str:
    other = rng.choice(list(recipes().values()))
    return text[: rng.randrange(len(text) + 1)] + other[rng.randrange(len(other)) :]


def _override(rng: random.Random, text: str) -> str:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(OVERRIDES)
    keys = re.findall(r"[\w-]+(?=:)", text) or ["a"]
    path = ".".join(rng.choices([*keys, "system", "guidance", "trainer", "data", "0"], k=rng.randrange(1, 4)))
    override = f"{path}={rng.choice(VALUES if rng.random() < 0.7 else PLAIN_VALUES)}"
    if kind < 0.9:
        return override
    at = rng.randrange(len(override) + 1)
    return override[:at] + rng.choice("=.[]{}'\"\\ $\x00:\ud800") + override[at:]


def _bytes(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return (
        content[:at] + rng.choice((b"\xff", b"\xfe\xff", b"\xc0\x80", b"\x00", b"\xed\xa0\x80", b"\x80")) + content[at:]
    )


TARGET = FuzzTarget(make, check)
