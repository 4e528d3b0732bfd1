"""The cameras of a video as JSON, for other renderers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from scoredist3d.cameras import Cameras
from scoredist3d.files import write_json

CONVENTION = (
    "World right-handed, z up; the object's front looks along +x. Cameras look along their own -z, x right, y up "
    "(OpenGL); matrices map camera to world, row by row. transform_matrix is c2w under the name that NeRF and "
    "instant-ngp use for exactly this convention. Angles in radians, fl_x, fl_y, cx, cy in pixels, lengths in scene "
    "units, time in seconds."
)


def camera_path(cameras: Cameras, fps: float) -> dict[str, Any]:
    """A JSON document with one frame per camera.

    Beside our own keys (``c2w``, ``fovy``, ``width``, ``height`` per frame) it has those of the ``transforms.json`` of
    NeRF and instant-ngp: ``camera_angle_x``, ``fl_x``, ``fl_y``, ``cx``, ``cy``, ``w``, ``h`` and per frame
    ``transform_matrix``. Our world and camera axes are those of that format, so the matrices are equal. The keys of the
    whole file hold the first camera's field of view.

    Args:
        cameras: One per frame.
        fps: Frames per second.

    Raises:
        ValueError: No camera, or fps that is not positive.
    """
    if len(cameras) == 0:
        raise ValueError("a camera path needs at least one camera")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    width, height = cameras.width, cameras.height
    matrices, angles = cameras.c2w.double().cpu().tolist(), cameras.fovy.double().cpu().tolist()
    focal = 0.5 * height / math.tan(0.5 * angles[0])
    frames = [
        {"time": index / fps, "c2w": c2w, "fovy": fovy, "width": width, "height": height, "transform_matrix": c2w}
        for index, (c2w, fovy) in enumerate(zip(matrices, angles, strict=True))
    ]
    return {
        "convention": CONVENTION,
        "fps": fps,
        "w": width,
        "h": height,
        "camera_angle_x": 2.0 * math.atan(0.5 * width / focal),
        "camera_angle_y": angles[0],
        "fl_x": focal,
        "fl_y": focal,
        "cx": 0.5 * width,
        "cy": 0.5 * height,
        "frames": frames,
    }


def write_camera_path(path: Path, cameras: Cameras, fps: float) -> Path:
    """Write :func:`camera_path` as a JSON file, atomically; returns ``path``."""
    return write_json(Path(path), camera_path(cameras, fps))
