"""A new export format takes one file of at most 60 lines, in the repository or in ``custom/``."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from shared.custom_packages import forget_custom
from shared.export_fields import AnalyticField, box
from shared.pbr_shapes import MeshShape, uv_sphere

from scoredist3d import cli, registry
from scoredist3d.config import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.export.formats import base

SOURCE = Path(__file__).with_name("off_format.py")
MOST_LINES = 60


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The shipped formats; what a test registers is forgotten afterwards."""
    base.format_names()
    monkeypatch.setattr(base, "_formats", dict(base._formats))
    yield
    forget_custom()


@pytest.fixture
def off(formats: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format OFF, registered for one test."""
    monkeypatch.syspath_prepend(str(SOURCE.parent))
    monkeypatch.delitem(sys.modules, SOURCE.stem, raising=False)
    importlib.import_module(SOURCE.stem)


def exporter(*formats: str):
    config = {"type": "textured-mesh", "formats": list(formats), "resolution": 32, "texture_size": 64, "max_faces": 500}
    config["check"] = False
    return registry.build(parse_component("exporter", config))


def test_the_format_fits_the_limit() -> None:
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_new_format_is_exported_and_read_back(off: None, tmp_path: Path) -> None:
    mesh = uv_sphere()
    result = exporter("off").export(MeshShape(mesh), tmp_path, "ball")
    assert [path.name for path in result.paths] == ["ball.off"] and result.report.bytes.keys() == {"ball.off"}
    # Only a surface is needed, so nothing is unwrapped or baked.
    assert list(result.report.seconds) == ["surface", "simplify", "write"] and result.report.mesh.channels == ()
    loaded = trimesh.load(tmp_path / "ball.off", process=False)
    np.testing.assert_allclose(loaded.vertices[:, [2, 0, 1]], mesh.vertices, atol=1e-6)
    np.testing.assert_array_equal(loaded.faces, mesh.faces)


def test_the_new_format_stands_beside_the_others(off: None, tmp_path: Path) -> None:
    result = exporter("glb", "off", "stl").export(AnalyticField(box((0.4, 0.2, 0.1))), tmp_path, "box")
    assert [path.suffix for path in result.paths] == [".glb", ".off", ".stl"]
    one, other = (trimesh.load(tmp_path / f"box.{suffix}") for suffix in ("off", "stl"))
    assert one.is_watertight and len(one.faces) == len(other.faces)
    assert one.volume == pytest.approx(other.volume, rel=1e-5)


def test_unknown_formats_are_refused_with_near_matches(off: None) -> None:
    with pytest.raises(ConfigError, match=r"formats\.0: must be one of .*'off'.*, got 'of'\. Did you mean .*'off'"):
        exporter("of")
    config_cls = registry.lookup("exporter", "textured-mesh").config_cls
    with pytest.raises(ConfigError, match=r"formats\.0: must be one of .* Did you mean 'glb'"):
        config_cls(formats=["glbb"])


def test_the_format_is_unknown_again() -> None:
    assert base.format_names() == ["glb", "obj", "ply", "splats", "stl", "usdz"]


def test_a_name_is_taken_once(off: None) -> None:
    with pytest.raises(ValueError, match=r"'off' is already registered by off_format\.write_off; choose another name"):
        base.register_format("off", suffix=".off", needs=base.lookup_format("off").needs, summary="")(lambda *_: [])


def test_a_format_in_a_user_folder_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(SOURCE, tmp_path / "mine")
    assert cli.main(["--describe", "exporter/textured-mesh", "--custom", str(tmp_path / "mine")]) == cli.OK
    accepted = " ".join(capsys.readouterr().out.split())
    assert "a list, each item one of 'glb', 'obj', 'off', 'ply', 'splats', 'stl', 'usdz'" in accepted
