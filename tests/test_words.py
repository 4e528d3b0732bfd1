"""The project's vocabulary: words and names that were replaced by the field's terms do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("scoredist3d", "configs", "docs", "custom", "scripts", "benchmarks", "examples")
SINGLE_FILES = ("README.md", "CONTRIBUTING.md", "launch.py")
EXEMPT = ("scoredist3d/paths.py", "scripts/compare_checkouts.py")
"""Files that translate earlier names."""
SUFFIXES = {".py", ".md", ".yaml", ".c"}

REPLACED: dict[str, str] = {
    r"\bBranches\b": "CFGConditions",
    r"\bGuidanceStep\b": "StepContext",
    r"\bguided_rows\b": "guided_nfe",
    r"\bsample_levels\b|\blevel_tensor\b|\bfinal_level\b": "timesteps",
    r"\bfacing_away\b": "orientation",
    r"\bstart_from\b|\bshape_start\b|\bgaussians_start\b": "init_from, sdf_init, initialization",
    r"\bclassifier-sd\b": "csd",
    r"\bcollaborative-csd\b": "collaborative-sd",
    r"\bdelta-denoising\b": "dds",
    r"\bposterior-distillation\b": "pds",
    r"\bno-material\b": "unlit",
    r"\b(is|are|was|were|be|been|being) told\b|\btold (as|about|the|zeros|to)\b": "conditioned on, receives, is given",
    r"\blet be\b": "skipped",
    r"\bpulls? at\b": "gradient",
    r"\bcomes? and goe?s?\b": "adaptive density control",
    r"\bnowhere in particular\b": "view-independent",
    r"\bthat are none\b": "name the deviation",
    r"\bmeans something where\b": "undefined where",
    r"\bthe very same\b": "the same",
    r"\bgo(es)? on counting\b": "continues from step",
    r"\bcrumbs\b": "tiny components",
    r"\bhow it goes\b": "usage",
    r"\bseen from nowhere\b": "view-independent",
    r"\boutside[_ ]of[_ ]the[_ ]tree\b|_outside_the_tree\b": "not registered as submodules",
}
"""Regular expression of a replaced word -> what is written today."""


def texts() -> list[Path]:
    found = [ROOT / name for name in SINGLE_FILES]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(found)


def offences(text: str, pattern: str) -> list[str]:
    """Lines that hold the pattern; an earlier name may stand where it is declared as an alias."""
    lines = text.splitlines()
    return [
        f"{number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if re.search(pattern, line) and not re.search(r"\baliases\b|\bALIASES\b|# alias|\balias of\b", line)
    ]


@pytest.mark.parametrize(("pattern", "instead"), REPLACED.items())
def test_replaced_words_stay_away(pattern: str, instead: str) -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in texts()
        if str(path.relative_to(ROOT)) not in EXEMPT and (lines := offences(path.read_text(encoding="utf-8"), pattern))
    }
    assert found == {}, f"write instead: {instead}"


def test_the_search_finds_an_offence() -> None:
    assert offences("a\nthe network is told zeros\n", r"\bis told\b") == ["2: the network is told zeros"]
    assert offences('@register("x", "dds", aliases=("delta-denoising",))', r"\bdelta-denoising\b") == []
    assert len(texts()) > 200
