"""Runs the Triton splatting kernels in Triton's interpreter on CPU tensors and compares them with torch.

A script and not a test: the interpreter must be chosen before Triton is imported. test_splatting_triton.py runs it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from splatting_scenes import GAUSSIANS, all_gradients, assert_agree, random_scene

from scoredist3d.ops.splatting.splat import project
from scoredist3d.ops.splatting.tiles import assign_tiles
from scoredist3d.ops.splatting.tiles_triton import gaussians_and_lists
from scoredist3d.ops.splatting.types import ProjectedGaussians

# Gaussians, channels, cameras, size, scale, antialiased: many in one tile (finished pixels), more than one group of
# channels, sizes that are no multiples of the tile, more than one block of Gaussians, nothing to see.
CASES = (
    (20, 3, 2, (19, 37), 0.15, False),
    (150, 3, 1, (20, 16), 0.5, True),
    (12, 16, 1, (16, 21), 0.2, True),
    (0, 3, 1, (8, 8), 0.2, False),
)


def projected(scene: dict, size: tuple[int, int], backend: str, **options) -> ProjectedGaussians:
    return project(
        *(scene[n] for n in ("means", "scales", "quaternions", "w2c", "focal")), *size, backend=backend, **options
    )


def compare_images_and_gradients() -> None:
    """Gradients of everything but the cameras, for which torch would project."""
    for count, channels, batch, size, scale, antialiased in CASES:
        scene = random_scene(count, channels, batch, seed=count, scale=scale)
        if count == 150:
            scene["opacities"] = scene["opacities"] * 0.2 + 0.8  # beyond MAX_ALPHA and finished early
        found, expected = (
            all_gradients(scene, *size, name, antialiased=antialiased, moving=GAUSSIANS) for name in ("triton", "torch")
        )
        if count:
            assert_agree(found, expected, 2e-5)
        assert not count or expected["opacity"].max() > 0.5
        print(f"splatting {count} {channels}: equal")


def compare_colors_of_each_camera() -> None:
    scene = random_scene(20, 2, 2)
    scene["colors"] = torch.stack([scene["colors"], 1 - scene["colors"]])
    found, expected = (
        all_gradients(scene, 16, 16, name, antialiased=True, moving=GAUSSIANS) for name in ("triton", "torch")
    )
    assert_agree(found, expected, 2e-5)
    print("colours of each camera: equal")


def compare_projections() -> None:
    """All projected values, also of invisible, non-finite, flat and thin Gaussians; and gradients of single outputs."""
    scene = random_scene(140, 1, 2, seed=5)
    scene["scales"][3], scene["scales"][4] = torch.tensor([1.0, 1e-6, 1e-6]), 1e-20
    scene["quaternions"][5] = 0.0
    broken = scene["means"].clone()
    broken[1, 0], broken[2] = float("nan"), float("inf")
    for dilation, antialiased in ((0.3, False), (0.8, True)):
        options = {"dilation": dilation, "antialiased": antialiased, "near": 0.5}
        found, expected = (projected(scene, (50, 70), name, **options) for name in ("triton", "torch"))
        assert 50 < expected.visible.sum() < 275 and torch.equal(found.visible, expected.visible)
        for name in ("means2d", "depth", "radius", "stds", "conics", *(["compensation"] if antialiased else [])):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
        seen = projected(scene | {"means": broken}, (50, 70), "triton", **options).visible
        assert not seen[:, 1:3].any() and torch.equal(seen[:, 3:], expected.visible[:, 3:])
        print(f"projection {dilation}: equal")
    for name in ("conics", "depth"):
        gradients = []
        for backend in ("triton", "torch"):
            leaves = {key: scene[key].clone().requires_grad_() for key in ("means", "scales", "quaternions")}
            value = getattr(projected(scene | leaves, (50, 70), backend), name).square()
            gradients.append(torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-3, atol=1e-3)
        print(f"gradient of the {name} alone: equal")


def compare_camera_gradients() -> None:
    scene = random_scene(30, 1, 2)
    gradients = []
    for backend in ("triton", "torch"):
        camera = {name: scene[name].clone().requires_grad_() for name in ("w2c", "focal")}
        plane = projected(scene | camera, (20, 20), backend)
        value = plane.means2d.square().sum() + plane.conics.square().sum() + plane.depth.square().sum()
        gradients.append(torch.autograd.grad(value, list(camera.values())))
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*gradients, strict=True))
    print("gradients of the cameras: equal")


def compare_lists() -> None:
    """The same entries in the same order; of Gaussians at the same depth, the first is in front."""
    scene = random_scene(200, 2, 2, seed=8)
    scene["means"][10:20] = scene["means"][10]
    plane = projected(scene, (50, 70), "torch", antialiased=True)
    _, found = gaussians_and_lists(plane, scene["colors"], scene["opacities"], 50, 70)
    expected = assign_tiles(plane, scene["opacities"] * plane.compensation, 50, 70)
    for name in ("gaussians", "rows", "offsets", "row_offsets"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert len(expected) > 400 and found.grid == expected.grid
    print("tile lists: equal")


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_images_and_gradients()
    compare_colors_of_each_camera()
    compare_projections()
    compare_camera_gradients()
    compare_lists()
