"""Previews of a run from others, which become frames of its video."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from scoredist3d.limits import MAX_IMAGE_SIDE
from scoredist3d.visualization.turntable import animation

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"


def test_no_other_program_decodes_a_preview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    path = tmp_path / "step-000001.png"
    path.write_bytes(EPS)
    with pytest.raises(ValueError, match=r"step-000001\.png cannot be used: it is not an image .*; delete it"):
        list(animation([path], 1))


def test_previews_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "step-000001.png"
    for width in (2, MAX_IMAGE_SIDE + 1):
        Image.new("RGB", (width, 1), (255, 0, 0)).save(path)
        if width == 2:
            assert [frame.shape for frame in animation([path], 3)] == [(1, 2, 3)] * 3
    with pytest.raises(ValueError, match="its size is 16385 x 1 pixels"):
        list(animation([path], 1))
