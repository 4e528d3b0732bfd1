"""Runs the Triton splatting kernels in Triton's interpreter on CPU tensors and compares them with torch.

A script and not a test: the interpreter must be chosen before Triton is imported. test_splatting_triton.py runs it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from test_splatting import all_gradients, assert_agree, random_scene

# Gaussians, channels, cameras, size, scale, antialiased: many in one tile (finished pixels), more than one group of
# channels, sizes that are no multiples of the tile, nothing to see.
CASES = (
    (60, 3, 2, (19, 37), 0.15, False),
    (150, 3, 1, (20, 16), 0.5, True),
    (25, 16, 1, (16, 21), 0.2, False),
    (0, 3, 1, (8, 8), 0.2, False),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for count, channels, batch, size, scale, antialiased in CASES:
        scene = random_scene(count, channels, batch, seed=count, scale=scale)
        if count == 150:
            scene["opacities"] = scene["opacities"] * 0.2 + 0.8  # beyond MAX_ALPHA and finished early
        found, expected = (all_gradients(scene, *size, name, antialiased=antialiased) for name in ("triton", "torch"))
        if count:
            assert_agree(found, expected, 2e-5)
        assert not count or expected["opacity"].max() > 0.5
        print(f"splatting {count} {channels}: equal")
