"""No eight or more identical lines of code stand twice inside the package."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "scoredist3d"
MIN_LINES = 8


def skipped_lines(source: str) -> set[int]:
    """Numbers of the lines that hold only imports, docstrings or other bare strings."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            assert isinstance(node, ast.stmt) and node.end_lineno is not None
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def code_lines(source: str) -> list[tuple[int, str]]:
    """Number and text of each line of code, without comments, blanks, imports and docstrings; spaces normalized."""
    tokens: dict[int, list[str]] = defaultdict(list)
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            tokens[token.start[0]].append(token.string)
    skipped = skipped_lines(source)
    return [(number, " ".join(words)) for number, words in sorted(tokens.items()) if number not in skipped]


def duplicates(files: dict[str, str]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Lines at which runs of MIN_LINES identical lines begin, in two places, by pair of files."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, source in files.items():
        lines = code_lines(source)
        for start in range(len(lines) - MIN_LINES + 1):
            run = lines[start : start + MIN_LINES]
            places[tuple(text for _, text in run)].append((name, run[0][0]))
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for (first, line), *others in (places_of for places_of in places.values() if len(places_of) > 1):
        for name, other_line in others:
            found[first, name].append((line, other_line))
    return found


def test_duplicates_are_found() -> None:
    lines = "".join(f"x{k} = {k}\n" for k in range(MIN_LINES))
    files = {"a": lines, "b": f'"""Doc."""\n\nimport os\n{lines.replace("= 3", "=  3  # three")}', "c": lines[:-7]}
    assert duplicates(files) == {("a", "b"): [(1, 4)]}


def test_no_code_stands_twice() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    found = duplicates(files)
    assert found == {}, f"move the {MIN_LINES} or more identical lines that begin here into one function"
