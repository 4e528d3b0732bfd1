"""Triton kernels without a GPU: compiled for sm_90, and run in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared.triton_compilation import compile_for_hopper

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler in this process"
)


FLOATS = ["points", "direction", "table", "grad", "out", "origins", "directions", "near", "far", "jitter"]
FLOATS += ["starts", "ends", "densities", "weights", "values"]
TYPES = (
    dict.fromkeys(FLOATS, "*fp32")
    | dict.fromkeys(("step", "radius", "cells_per_unit", "last_cell", "max_depth"), "fp32")
    | dict.fromkeys(("num_points", "width", "levels", "num_rays", "max_intervals", "resolution", "channels"), "i32")
    | {"meta": "*i32", "occupancy": "*u8", "counts": "*i64", "offsets": "*i64", "ray_indices": "*i64"}
)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("name", ["_encode_kernel", "_table_gradient_kernel", "_point_gradient_kernel"])
def test_hash_grid_compiles_for_hopper(name, directed, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from scoredist3d.ops.hash_grid import triton_backend as hash_grid_triton

    constants = {"F": 2, "DIRECTED": directed, "BLOCK": hash_grid_triton._BLOCK}
    assert compile_for_hopper(getattr(hash_grid_triton, name), constants, TYPES) > 1000


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_march_kernel", {"HAS_OCCUPANCY": True, "FILL": False}),
        ("_march_kernel", {"HAS_OCCUPANCY": True, "FILL": True}),
        ("_march_kernel", {"HAS_OCCUPANCY": False, "FILL": True, "resolution": 1}),
        ("_weights_kernel", {}),
        ("_weights_gradient_kernel", {}),
        ("_accumulate_kernel", {"HAS_VALUES": True}),
        ("_accumulate_kernel", {"HAS_VALUES": False, "channels": 1}),
    ],
)
def test_ray_kernels_compile_for_hopper(name, constants, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from scoredist3d.ops.volume_rendering import triton_backend as rays_triton

    constants = {**constants, "RAYS": rays_triton._RAYS, "STEPS": rays_triton._STEPS}
    assert compile_for_hopper(getattr(rays_triton, name), constants, TYPES) > 1000


def test_interpreter_equals_torch():
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("hash grid") == 15 and "rays 12 density gradient" in done.stdout
