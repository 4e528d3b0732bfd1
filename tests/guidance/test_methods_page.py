"""docs/methods.md has a table row, a section and images for every registered method, and names existing options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scoredist3d import registry
from scoredist3d.config.walker import own_fields

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "methods.md").read_text(encoding="utf-8")
METHODS = registry.names("guidance")
NFE = r"[\d.]+(?: \+ [\d.]+ own)?"


def section(method: str) -> str:
    (found,) = [part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE) if f"; `{method}`*" in part]
    return found


def test_the_table_lists_every_method_with_its_paper_and_idea() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| \[(.+?)\]\(#(.+?)\) \| (\S+) \| (.+) \|$", TEXT, flags=re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(METHODS)
    for name, title, anchor, paper, idea in rows:
        entry = registry.lookup("guidance", name)
        assert (paper, idea) == (entry.arxiv, entry.summary)
        assert section(name).startswith(title + "\n") and anchor == title.lower().replace(" ", "-")


def test_every_row_of_a_table_has_the_columns_of_its_head() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        rows = table.splitlines()
        assert re.fullmatch(r"\|(?: --- \|)+", rows[1]), rows[0]
        assert {row.count("|") for row in rows} == {rows[1].count("|")}, rows[0]


@pytest.mark.parametrize("method", METHODS)
def test_its_section_is_whole(method: str) -> None:
    text = section(method)
    (formula,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    assert re.search(r"\bG\w* +=", formula)
    assert "Use it" in text and re.search(r"knob", text, flags=re.IGNORECASE)
    assert re.search(rf"\nNFE in the runs below: {NFE} in 2D, {NFE} in 3D\.\n", text)
    assert len(re.findall(rf"^\| {method} \|", TEXT, flags=re.MULTILINE)) == 3  # 2D, 3D and the table of times
    for dimension in ("2d", "3d"):
        (suffix,) = re.findall(rf"\]\(images/methods/{method}-{dimension}\.(jpg|png)\)", text)
        assert (DOCS / "images" / "methods" / f"{method}-{dimension}.{suffix}").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_the_options_it_names_exist(method: str) -> None:
    known = {field.name for field in own_fields(registry.lookup("guidance", method).config_cls)}
    known |= {"network", "rank", "lr", "steps", "repeats"} if "phi" in known else set()
    (knobs,) = re.findall(r"(?:Knobs:|The knobs? (?:is|are)) .*?(?=\n\n)", section(method), flags=re.DOTALL)
    values = {"posterior", "dreamcatalyst", "full"}
    assert set(re.findall(r"`([a-z_0-9]+)`", knobs)) - known - values == set()
