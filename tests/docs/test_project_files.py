"""Licence, citation, changelog, package metadata and hooks agree with each other; links between pages resolve."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import scoredist3d

ROOT = Path(__file__).resolve().parents[2]
# Of https://www.apache.org/licenses/LICENSE-2.0.txt.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
REPOSITORY = "https://github.com/scoredist3d/scoredist3d"
FOLDERS = ("benchmarks", "configs", "custom", "docs", "examples", "scoredist3d", "scripts", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Targets of links and pictures, inline or by reference."""
    text = re.sub(r"`[^`\n]*`", "", without_code(page.read_text(encoding="utf-8")))
    return [*re.findall(r"\]\(([^()\s]+)\)", text), *re.findall(r"^\[[^\]]+\]: (\S+)$", text, flags=re.MULTILINE)]


def anchors(page: Path) -> set[str]:
    """Anchors of headings as GitHub makes them: lower case, no punctuation, dashes for spaces, repeats numbered."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    for heading in headings:
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def requirements(name: str) -> set[str]:
    """Distribution names in a requirements file, those that are commented out included."""
    packages = {"tiny-cuda-nn": "tinycudann", "nvdiffrast": "nvdiffrast"}  # by repository
    lines = read(name).splitlines()
    pinned = {found[1] for line in lines if (found := re.match(r"(?:# )?([A-Za-z][\w-]*)(?:\[[\w,]*\])?==", line))}
    return pinned | {packages[found[1]] for line in lines if (found := re.match(r"git\+.*/([\w-]+)\.git", line))}


def listed_licences() -> set[str]:
    """Packages that docs/licences.md has a row for."""
    return set(re.findall(r"^\| `([\w-]+)` \|", read("docs/licences.md"), flags=re.MULTILINE))


def test_the_licence_is_the_unmodified_text() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2


def test_the_notice_covers_every_folder_of_weights() -> None:
    notice = read("NOTICE")
    assert "2026 The scoredist3d authors" in notice and "procedural" in notice
    assets = ROOT / "scoredist3d" / "assets"
    weights = {file.relative_to(assets).parts[0] for file in assets.rglob("*.safetensors")}
    assert "prior" in weights
    for folder in weights:
        assert f"scoredist3d/assets/{folder}" in notice
    assert "Apache-2.0" in read("scoredist3d/assets/prior/README.md")


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation), "required by the Citation File Format 1.2.0"
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == scoredist3d.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] == PROJECT["project"]["authors"] == [{"name": "The scoredist3d authors"}]
    assert citation["repository-code"] == REPOSITORY


def test_the_newest_release_of_the_changelog_is_this_version() -> None:
    text = read("CHANGELOG.md")
    unreleased, *releases = re.findall(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE)
    assert unreleased == "Unreleased"
    assert releases[0] == scoredist3d.__version__
    numbers = [tuple(map(int, release.split("."))) for release in releases]
    assert numbers == sorted(set(numbers), reverse=True)
    assert set(re.findall(r"^\[([^\]]+)\]: https://", text, flags=re.MULTILINE)) == {unreleased, *releases}
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_security_policy_supports_this_version() -> None:
    minor = ".".join(scoredist3d.__version__.split(".")[:2])
    assert f"| {minor}.x | yes |" in read("SECURITY.md")


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "scoredist3d" / "py.typed").is_file()
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["scoredist3d"]  # all of its files


def test_the_metadata_of_the_package() -> None:
    project = PROJECT["project"]
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE", "NOTICE"]
    assert project["keywords"]
    # Build tools refuse a licence classifier beside an SPDX expression (PEP 639).
    assert project["classifiers"] and not [name for name in project["classifiers"] if name.startswith("License ::")]
    urls = project["urls"]
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= set(urls)
    assert all(url.startswith(REPOSITORY) for url in urls.values())
    for name in ("Documentation", "Changelog"):
        assert (ROOT / urls[name].partition("/main/")[2]).exists()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-cuda.txt"])
def test_the_licence_of_every_requirement_is_listed(name: str) -> None:
    assert requirements(name) and requirements(name) <= listed_licences()


def test_the_licence_of_every_dependency_is_listed() -> None:
    project = PROJECT["project"]
    extras = [item for items in project.get("optional-dependencies", {}).values() for item in items]
    names = {re.split(r"[^\w-]", item, maxsplit=1)[0].lower() for item in [*project["dependencies"], *extras]}
    assert "torch" in names
    assert names - {"scoredist3d"} <= listed_licences()


def test_hooks_run_from_the_environment_of_the_makefile() -> None:
    config = yaml.safe_load(read(".pre-commit-config.yaml"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    for tool in ("ruff-check", "ruff-format", "mypy"):
        assert hooks[tool]["language"] == "system"
        assert hooks[tool]["entry"].startswith(f".venv/bin/python -m {tool.split('-')[0]}")
    assert re.search(r"^VENV\s*\?= \.venv$", read("Makefile"), flags=re.MULTILINE)
    assert {"trailing-whitespace", "end-of-file", "large-files"} <= set(hooks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        url = urlsplit(target)
        if url.scheme:
            assert url.scheme in ("https", "mailto"), target
            continue
        file = page if not url.path else page.parent / unquote(url.path)
        assert file.exists(), f"{target}: no such file"
        if url.fragment and file.suffix == ".md":
            assert url.fragment in anchors(file), f"{target}: no such heading"


def test_the_reader_of_links_and_anchors(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n## Twice\n## Twice\n[x](y.md#z) `[no](no.md)`\n```sh\n# no\n[no](no)\n```\n[r]: r.md\n"
    )
    assert anchors(page) == {"a-b-c", "twice", "twice-1"}
    assert links(page) == ["y.md#z", "r.md"]
