"""JSON files with the cameras of a video, for use in other renderers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from scoredist3d.cameras import Cameras
from scoredist3d.files import write_json

CONVENTION = (
    "The world is right-handed with z up; the object's front faces +x. Cameras follow OpenGL: they look along -z, with "
    "x to the right and y up. Matrices map camera to world coordinates and are stored row by row. transform_matrix "
    "equals c2w; NeRF and instant-ngp use this name for the same convention. Angles are in radians, fl_x, fl_y, cx and "
    "cy in pixels, lengths in scene units, time in seconds."
)


def camera_path(cameras: Cameras, fps: float) -> dict[str, Any]:
    """JSON document with one frame per camera.

    Each frame has the keys ``c2w``, ``fovy``, ``width`` and ``height``. In addition, the document has the keys of the
    ``transforms.json`` of NeRF and instant-ngp: ``camera_angle_x``, ``fl_x``, ``fl_y``, ``cx``, ``cy``, ``w`` and
    ``h``, and ``transform_matrix`` in each frame. The world and camera axes of that format are the same as here, so its
    matrices equal ``c2w``. The field of view at the top level is that of the first camera.

    Args:
        cameras: One camera per frame.
        fps: Frames per second.

    Raises:
        ValueError: There is no camera, or ``fps`` is not positive.
    """
    if len(cameras) == 0:
        raise ValueError("cameras: a camera path needs at least one camera")
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
    """Write :func:`camera_path` to a JSON file atomically and return ``path``."""
    return write_json(Path(path), camera_path(cameras, fps))
