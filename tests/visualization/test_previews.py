"""Preview grids: rows of scenes, of methods and of images, and depth as gray levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from scoredist3d.config.experiment import PreviewConfig
from scoredist3d.visualization.previews import method_rows, preview_grid
from scoredist3d.visualization.views import depth_image


class Images:
    """A system of ``count`` gray images."""

    def __init__(self, count: int, level: float = 0.5, size: int = 8) -> None:
        self.shape, self.level = (count, size, size, 3), level

    def images(self) -> torch.Tensor:
        return torch.full(self.shape, self.level)


class Methods:
    """A system of two methods with different numbers of images."""

    methods = {"one": Images(1, 0.25), "two": Images(2, 0.75, 16)}  # noqa: RUF012


def test_images_are_shown_at_their_own_size() -> None:
    system: Any = Images(4)
    grid = preview_grid(system, PreviewConfig(size=64))
    assert grid.shape == (8 + 2 + 8, 8 + 2 + 8, 3) and grid.dtype == np.uint8
    assert (grid[:8, :8] == 128).all() and (grid[8:10] == 255).all()


def test_methods_have_rows_of_equal_length_and_size() -> None:
    system: Any = Methods()
    rows = method_rows(system, 10)
    assert {label: tuple(row.shape) for label, row in rows.items()} == dict.fromkeys(("one", "two"), (2, 10, 10, 3))
    assert bool((rows["one"][0] == 0.25).all()) and bool((rows["one"][1] == 1.0).all())
    assert preview_grid(system, PreviewConfig(size=10)).shape[1] == 10 + 2 + 10


def test_a_system_with_nothing_to_show_is_named() -> None:
    system: Any = object()
    with pytest.raises(TypeError, match="object has no scenes, images or methods to show"):
        preview_grid(system, PreviewConfig())


def test_near_is_bright_and_background_is_black() -> None:
    depth = torch.tensor([1.0, 2.0, 3.0, 9.0]).view(1, 2, 2, 1)
    opacity = torch.tensor([1.0, 0.9, 0.6, 0.5]).view(1, 2, 2, 1)
    torch.testing.assert_close(depth_image(depth, opacity).flatten(), torch.tensor([1.0, 0.6, 0.2, 0.0]))
    assert not bool(depth_image(depth, torch.zeros_like(opacity)).any())
