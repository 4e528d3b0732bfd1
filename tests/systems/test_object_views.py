"""Views of a scene's object over white, with and without lighting."""

from __future__ import annotations

import torch
from shared.surface_scenes import FixedMesh, build, icosphere, renderer_of, views
from torch import Tensor

from scoredist3d.geometry.base import SurfacePoints
from scoredist3d.systems.object_views import object_views


def features(points: SurfacePoints) -> Tensor:
    return torch.nn.functional.pad(2.0 * points.points, (0, 5))


def renderer(material: str, num_features: int = 3, **options: object):  # type: ignore[no-untyped-def]
    geometry = FixedMesh(icosphere(0.6), lambda points: features(points)[:, :num_features], num_features=num_features)
    return renderer_of(geometry, material=build("material", material, **options))


def test_unlit_colors_are_over_white_and_rendered_once() -> None:
    seen = object_views(renderer("unlit"), views(0.0, 90.0), step=0)
    assert not seen.lit and seen.base_color is seen.rgb and seen.rgb.shape == (2, 64, 64, 3)
    torch.testing.assert_close(seen.rgb[:, 0, 0], torch.ones(2, 3))  # the renderer's own background is black
    middle = seen.rgb[0, 32, 32]
    torch.testing.assert_close(middle, torch.tensor([1.2, 0.0, 0.0]).sigmoid(), atol=0.02, rtol=0)
    torch.testing.assert_close(seen.depth[0, 32, 32], torch.tensor([2.4]), atol=0.01, rtol=0)


def test_lit_materials_are_also_shown_without_light() -> None:
    plain = object_views(renderer("unlit"), views(0.0), step=0)
    lit = renderer("pbr", 5)
    material, background = lit.material, lit.background
    seen = object_views(lit, views(0.0), step=0)
    assert seen.lit and lit.material is material and lit.background is background
    torch.testing.assert_close(seen.base_color, plain.rgb)
    assert float((seen.rgb - seen.base_color).abs().max()) > 0.1
    # The diffuse material shows its albedo in evaluation unless configured otherwise.
    assert not object_views(renderer("diffuse"), views(0.0), step=0).lit
    assert object_views(renderer("diffuse", evaluation="textureless"), views(0.0), step=0).lit
