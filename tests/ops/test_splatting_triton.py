"""Splatting on the GPU: the Triton kernels compiled for sm_90, in the interpreter, on CUDA; and gsplat."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_splatting import all_gradients, assert_agree, random_scene, render
from test_triton import compile_for_hopper

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process"
)

TYPES = (
    dict.fromkeys(("means", "conics", "features", "opacities", "image", "transmittance"), "*fp32")
    | dict.fromkeys(("of_image", "of_opacity", "out"), "*fp32")
    | dict.fromkeys(("gaussians", "offsets", "order", "row_offsets"), "*i64")
    | dict.fromkeys(("height", "width", "down", "across", "channels", "count"), "i32")
    | {"last": "*i32"}
)


@pytest.mark.parametrize("name", ["_composite_kernel", "_entry_gradient_kernel", "_sum_rows_kernel"])
def test_kernels_compile_for_hopper(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from scoredist3d.ops import splatting_triton as kernels

    constants = {
        "_composite_kernel": kernels._FORWARD,
        "_entry_gradient_kernel": kernels._BACKWARD,
        "_sum_rows_kernel": {"BLOCK": kernels._BLOCK},
    }
    types = TYPES | {"rows": "*fp32" if name == "_sum_rows_kernel" else "*i64"}
    assert compile_for_hopper(getattr(kernels, name), constants[name], types) > 1000


def test_interpreter_equals_torch():
    script = Path(__file__).with_name("interpreted_splatting.py")
    paths = os.pathsep.join([str(script.parents[2]), str(script.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 4


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
def test_triton_equals_torch(count, channels, batch, size, scale):
    scene = random_scene(count, channels, batch, seed=count, scale=scale)
    found = cuda_gradients(scene, *size, "triton")
    assert_agree(found, cuda_gradients(scene, *size, "torch"), 1e-4)


@pytest.mark.gpu
def test_triton_repeats_bit_by_bit():
    scene = on_gpu(random_scene(3000, 4, 2, scale=0.2))
    first, second = (all_gradients(scene, 100, 90, "triton") for _ in range(2))
    for name in ("color", "opacity", "depth", "gradient of means2d", "gradient of conics", "gradient of depth"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("antialiased", [False, True])
def test_gsplat_draws_the_same(antialiased):
    """Our projection and compositing against gsplat's whole pipeline, and against its compositing of our projection."""
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
    assert_agree(cuda_gradients(scene, 50, 70, "gsplat"), cuda_gradients(scene, 50, 70, "triton"), 1e-3)
