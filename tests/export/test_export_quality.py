"""Small version of the export benchmark, whose renderer shares no code with the package."""

from dataclasses import replace

import export_quality
import numpy as np
import pytest
import torch
from export_quality import OBJECTS, Textured, measure, own_view, psnr

from scoredist3d.cameras import orbit

SMALL = {"resolution": 80, "max_faces": 3000, "texture_size": 512}


@pytest.mark.parametrize("name", ["smooth torus", "checked box"])
def test_an_exported_file_looks_like_the_object(name):
    result = measure(OBJECTS[name], SMALL, views=2, size=96)
    assert result.worst >= 30.0 and result.chamfer < 0.005


def test_the_ray_caster_knows_a_triangle():
    # A triangle in the plane x = 0, seen from +x; its texture is red on the left (-y) and blue on the right.
    triangle = np.array([[[0, -1, -1], [0, 1, -1], [0, -1, 1]]], float)
    texture = np.zeros((2, 2, 3))
    texture[:, 0, 0] = texture[:, 1, 2] = 1.0
    camera = orbit(*(torch.tensor([value]) for value in (0.0, 0.0, 4.0, 40.0)), 41, 41)
    seen = Textured(triangle, np.array([[[0, 0], [1, 0], [0, 1]]], float), texture)
    image = seen.view(camera)
    focal = 20.5 / np.tan(np.radians(20))
    reach = focal / 4  # pixels per unit
    row, left, right = int(20.5 + 0.9 * reach), int(20.5 - 0.9 * reach), int(20.5 + 0.8 * reach)
    np.testing.assert_allclose(image[row, left], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(image[row, right], [0, 0, 1], atol=1e-6)
    assert (image[int(20.5 - 0.5 * reach), right] == 1).all() and (image[0] == 1).all()
    assert (replace(seen, triangles=triangle[:, ::-1]).view(camera) == 1).all()  # from behind


def test_the_comparison_sees_a_wrong_export():
    torus, camera = OBJECTS["smooth torus"], orbit(*(torch.tensor([v]) for v in (25.0, 35.0, 3.2, 40.0)), 64, 64)
    reference = own_view(torus, camera)
    swapped = replace(torus, color=lambda p: torus.color(p[:, [1, 2, 0]]))
    assert psnr(reference, reference) > 100
    assert psnr(reference, own_view(swapped, camera)) < 20
    assert export_quality.LEAST_PSNR == 30.0
