"""Splatting on the GPU: the Triton kernels compiled for sm_90, in the interpreter, on CUDA; and gsplat."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared.triton_compilation import compile_for_hopper
from splatting_scenes import GAUSSIANS, all_gradients, assert_agree, random_scene, render

from scoredist3d.ops.splatting.splat import project

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process"
)

FLOATS = ["means", "conics", "features", "opacities", "color_image", "opacity_image", "depth_image", "transmittance"]
FLOATS += ["of_color", "of_opacity", "of_depth", "of_means2d", "of_conics", "of_depths", "of_compensation", "out"]
FLOATS += ["by_means", "by_conics", "by_depths", "by_compensation", "by_opacities", "by_colors", "by_scales"]
FLOATS += ["scales", "quaternions", "by_quaternions", "w2c", "focal", "means2d", "depths", "radii", "deviations"]
FLOATS += ["compensation", "colors", "alphas"]
INTEGERS = ("down", "across", "channels", "count", "batch", "total", "camera_stride", "entries", "tiles")
TYPES = (
    dict.fromkeys(FLOATS, "*fp32")
    | dict.fromkeys(("gaussians", "offsets", "row_offsets", "counts", "keys", "rows"), "*i64")
    | dict.fromkeys(("last", "spans", "owners"), "*i32")
    | dict.fromkeys(INTEGERS, "i32")
    | dict.fromkeys(("near", "dilation"), "fp32")
    | {"visible": "*i1"}
)
PLAIN = {"compensation": None}
ONES = {"down": 1, "across": 1, "channels": 1}  # Triton makes constants of integers that are 1


@pytest.mark.parametrize(
    ("module", "kernel", "constants", "further"),
    [
        ("triton_backend", "_composite_kernel", "_FORWARD", {}),
        ("triton_backend", "_entry_gradient_kernel", "_BACKWARD", {}),
        ("triton_backend", "_sum_rows_kernel", "_SUM", {"SHARED": True}),
        (
            "triton_backend",
            "_sum_rows_kernel",
            "_SUM",
            {"SHARED": False, "by_compensation": None, "batch": 1, **PLAIN},
        ),
        ("tiles_triton", "_measure_kernel", "_MEASURE", {}),
        ("tiles_triton", "_measure_kernel", "_MEASURE", PLAIN),
        ("tiles_triton", "_measure_kernel", "_MEASURE", ONES),
        ("tiles_triton", "_fill_kernel", "_FILL", {}),
        ("tiles_triton", "_finish_kernel", "_FILL", {}),
        ("project_triton", "_project_kernel", "_FORWARD", {}),
        ("project_triton", "_project_kernel", "_FORWARD", PLAIN),
        ("project_triton", "_project_gradient_kernel", "_CONSTANTS", {}),
        ("project_triton", "_project_gradient_kernel", "_CONSTANTS", {"of_compensation": None, "batch": 1}),
    ],
)
def test_kernels_compile_for_hopper(module, kernel, constants, further, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module(f"scoredist3d.ops.splatting.{module}")
    size = "fp32" if module == "project_triton" else "i32"
    types = TYPES | {"height": size, "width": size} | ({"rows": "*fp32"} if kernel == "_sum_rows_kernel" else {})
    assert compile_for_hopper(getattr(kernels, kernel), getattr(kernels, constants) | further, types) > 1000


def test_interpreter_equals_torch():
    script = Path(__file__).with_name("interpreted_splatting.py")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 11


def on_gpu(scene: dict) -> dict:
    return {name: tensor.cuda() for name, tensor in scene.items()}


def cuda_gradients(scene: dict, height: int, width: int, backend: str, **options) -> dict:
    found = all_gradients(on_gpu(scene), height, width, backend, **options)
    return {name: tensor.cpu() for name, tensor in found.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("count", "channels", "batch", "size", "scale"),
    [
        (300, 3, 2, (50, 70), 0.1),
        (2000, 3, 1, (129, 64), 0.3),
        (500, 17, 2, (40, 40), 0.15),
        (400, 63, 1, (5, 70), 0.2),
    ],
)
@pytest.mark.parametrize("antialiased", [False, True])
def test_triton_equals_torch(count, channels, batch, size, scale, antialiased):
    """With camera gradients torch projects for both backends, so that the same pixels reach the thresholds."""
    scene = random_scene(count, channels, batch, seed=count, scale=scale)
    found, expected = (cuda_gradients(scene, *size, name, antialiased=antialiased) for name in ("triton", "torch"))
    assert_agree(found, expected, 1e-4)


def projection_and_gradients(scene: dict, height: int, width: int, backend: str, **options) -> dict:
    """Projected values of the visible Gaussians, and gradients of random sums of the differentiable ones."""
    leaves = {name: scene[name].clone().requires_grad_() for name in ("means", "scales", "quaternions")}
    projected = project(*leaves.values(), scene["w2c"], scene["focal"], height, width, backend=backend, **options)
    visible, generator = projected.visible, torch.Generator().manual_seed(0)
    names = ("means2d", "conics", "depth", "compensation", "radius", "stds")
    values = {name: getattr(projected, name)[visible] for name in names if getattr(projected, name) is not None}
    loss = sum((v * torch.randn(v.shape, generator=generator).to(v)).sum() for v in values.values() if v.requires_grad)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert visible.any() and not visible.all()
    return values | {"visible": visible.float()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "antialiased"), [(1, False), (3, True)])
def test_projection_equals_torch(batch, antialiased):
    scene = on_gpu(random_scene(5000, 1, batch, scale=0.1))
    found, expected = (
        projection_and_gradients(scene, 50, 70, name, antialiased=antialiased) for name in ("triton", "torch")
    )
    assert_agree(found, expected, 1e-4)


@pytest.mark.gpu
def test_triton_repeats_bit_by_bit():
    scene = on_gpu(random_scene(3000, 4, 2, scale=0.2))
    first, second = (all_gradients(scene, 100, 90, "triton", moving=GAUSSIANS) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("antialiased", [False, True])
def test_gsplat_draws_the_same(antialiased):
    """Every backend, including gsplat's compositing alone, against the whole pipeline of gsplat."""
    gsplat = pytest.importorskip("gsplat")
    scene, height, width = on_gpu(random_scene(500, 3, 2, scale=0.1)), 50, 70
    intrinsics = torch.zeros(2, 3, 3, device="cuda")
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = scene["focal"]
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = width / 2, height / 2, 1.0
    opencv = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], device="cuda")) @ scene["w2c"]
    theirs, opacity, _ = gsplat.rasterization(
        scene["means"], scene["quaternions"], scene["scales"], scene["opacities"], scene["colors"], opencv, intrinsics,
        width, height, near_plane=0.01, eps2d=0.3, render_mode="RGB+D", packed=False,
        rasterize_mode="antialiased" if antialiased else "classic",
    )  # fmt: skip
    for backend in ("triton", "torch", "gsplat"):
        ours = render(scene, height, width, backend, antialiased=antialiased)
        # Rounding moves a few pixels over the thresholds of 1/255 and 1e-4: jumps of at most that.
        for found, expected in ((ours.color, theirs[..., :3]), (ours.opacity, opacity), (ours.depth, theirs[..., 3:])):
            difference = (found - expected).abs()
            assert difference.max() < 0.02 and (difference > 1e-3).float().mean() < 1e-3, backend


@pytest.mark.gpu
def test_gsplat_backend_has_the_same_gradients():
    pytest.importorskip("gsplat")
    scene = random_scene(300, 6, 2, scale=0.1)
    found, expected = (cuda_gradients(scene, 50, 70, name, moving=GAUSSIANS) for name in ("gsplat", "triton"))
    assert_agree(found, expected, 1e-3)
