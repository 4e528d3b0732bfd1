"""3D Gaussian splats as plain data, independent of any optimization, and loading of their PLY files.

Files have the layout of the original implementation of 3D Gaussian splatting (arXiv 2308.04079), which common viewers
and editors read: ``x y z nx ny nz f_dc_* f_rest_* opacity scale_* rot_*``, all float, binary little endian. Opacities
are stored as logits, scales as logarithms, colors as spherical harmonics coefficients, channel by channel. Files
are y up, like all other exports by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scoredist3d.limits import MAX_MESH_BYTES, MAX_POINTS, check_file_size
from scoredist3d.ops.rotations import quaternion_product, rotation_matrices
from scoredist3d.ops.shading.spherical_harmonics import DC, num_coefficients, rotation_of

Up = Literal["y", "z", "auto"]

_TO_Y_UP = ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))  # file (x, y, z) = world (y, z, x)
_QUATERNION_TO_Y_UP = (0.5, -0.5, -0.5, -0.5)  # the same rotation: -120 degrees around (1, 1, 1)
_HEADER_LIMIT = 65536  # bytes
_SHOWN = 0.1  # opacity from which a Gaussian counts for the extent
_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
_FORMATS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}


@dataclass(frozen=True)
class Splats:
    """``N`` Gaussians in world coordinates (3D Gaussian splatting, arXiv 2308.04079).

    Attributes:
        means: (N, 3), scene units.
        scales: (N, 3), standard deviations along the principal axes, scene units, > 0.
        quaternions: (N, 4), unit, w first: principal axes to world.
        opacities: (N,), in (0, 1).
        colors: (N, 3), display sRGB in [0, 1], the view-independent part.
        harmonics: (N, K, 3) or None, spherical harmonics coefficients of degrees 1 and up, the view-dependent part.
    """

    means: Tensor
    scales: Tensor
    quaternions: Tensor
    opacities: Tensor
    colors: Tensor
    harmonics: Tensor | None = None

    @property
    def degree(self) -> int:
        """Degree of the spherical harmonics; 0 if there is no view-dependent part."""
        return 0 if self.harmonics is None else math.isqrt(self.harmonics.shape[1] + 1) - 1

    @property
    def extent(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner, each (3,), of the box around the Gaussians out to one standard deviation.

        Gaussians with an opacity below 0.1, which hardly show, do not count, unless all of them are below.
        """
        shown = self.opacities >= _SHOWN
        shown = shown if bool(shown.any()) else torch.ones_like(shown)
        axes = rotation_matrices(self.quaternions[shown]) * self.scales[shown, None, :]
        means, spread = self.means[shown], axes.norm(dim=-1)
        low, high = (means - spread).amin(dim=0), (means + spread).amax(dim=0)
        return low.detach().cpu().numpy(), high.detach().cpu().numpy()

    def moved(self, origin: Sequence[float], scale: float) -> Splats:
        """Copy with the world position ``origin`` at the origin and ``scale`` units per scene unit."""
        means = (self.means - self.means.new_tensor(origin)) * scale
        return replace(self, means=means, scales=self.scales * scale)

    def rotated(self, rotation: Tensor, quaternion: Tensor) -> Splats:
        """Copy rotated around the origin, including the view-dependent colors.

        Args:
            rotation: (3, 3) rotation matrix.
            quaternion: (4,), the same rotation as a unit quaternion, w first.
        """
        harmonics = self.harmonics
        if harmonics is not None:
            turn = rotation_of(rotation, self.degree)[1:, 1:].to(harmonics)
            harmonics = torch.einsum("jk,nkc->njc", turn, harmonics)
        return replace(
            self,
            means=self.means @ rotation.T.to(self.means),
            quaternions=quaternion_product(quaternion.to(self.quaternions), self.quaternions),
            harmonics=harmonics,
        )

    def to_y_up(self) -> Splats:
        """The Gaussians in the axes of PLY files: (x, y, z) of the file = (y, z, x) of the world."""
        return self.rotated(torch.tensor(_TO_Y_UP), torch.tensor(_QUATERNION_TO_Y_UP))

    def to_z_up(self) -> Splats:
        """The inverse of :meth:`to_y_up`."""
        quaternion = torch.tensor(_QUATERNION_TO_Y_UP) * torch.tensor([1.0, -1.0, -1.0, -1.0])
        return self.rotated(torch.tensor(_TO_Y_UP).T, quaternion)


def splat_properties(degree: int) -> list[str]:
    """Names of the properties of a file, in order, for spherical harmonics up to ``degree``."""
    rest = 3 * (num_coefficients(degree) - 1)
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{channel}" for channel in range(3)),
        *(f"f_rest_{index}" for index in range(rest)),
        "opacity",
        *(f"scale_{axis}" for axis in range(3)),
        *(f"rot_{part}" for part in range(4)),
    ]


def read_splats(path: Path | str, up: Up = "auto") -> Splats:
    """Read Gaussians from a PLY file in the layout of the module docstring; the order of its properties may differ.

    Args:
        path: A local file.
        up: Up axis of the file; ``auto`` uses the axis named in a "y up" or "z up" comment, or y if there is none.

    Raises:
        ValueError: The file does not exist, is damaged, has a different layout, or has values that are not finite.
    """
    table, axis = read_points_table(path, up)
    rest = sum(name.startswith("f_rest_") for name in table)
    if rest not in (0, 9, 24, 45):
        raise ValueError(f"{Path(path).name}: the number of properties f_rest_* must be 0, 9, 24 or 45, got {rest}")
    degree = math.isqrt(rest // 3 + 1) - 1
    means = _columns(path, table, ["x", "y", "z"])
    constant = _columns(path, table, [f"f_dc_{channel}" for channel in range(3)])
    harmonics = None
    if degree > 0:
        values = _columns(path, table, [f"f_rest_{index}" for index in range(rest)])
        harmonics = values.view(len(means), 3, -1).transpose(1, 2).contiguous()
    quaternions = _columns(path, table, [f"rot_{part}" for part in range(4)])
    lengths, scales = quaternions.norm(dim=-1), _columns(path, table, [f"scale_{axis}" for axis in range(3)]).exp()
    if not bool(((lengths > 0) & lengths.isfinite()).all()):
        raise ValueError(f"{Path(path).name}: a quaternion (rot_0 to rot_3) is zero or infinite: repair the file first")
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{Path(path).name}: a scale (scale_0 to scale_2) is infinite: repair the file first")
    splats = Splats(
        means,
        scales,
        F.normalize(quaternions, dim=-1),
        _columns(path, table, ["opacity"])[:, 0].sigmoid(),
        (0.5 + DC * constant).clamp(0.0, 1.0),
        harmonics,
    )
    return splats if axis == "z" else splats.to_z_up()


def read_points(path: Path | str, up: Up = "auto") -> tuple[Tensor, Tensor | None]:
    """World-space positions (N, 3) and colors (N, 3) in [0, 1] of a PLY point cloud.

    The colors are None if the file has none. They are read from ``red green blue`` (integers are divided by the maximum
    of their type) or, failing that, from the coefficients of Gaussian splats.

    Args:
        path: A local file.
        up: As in :func:`read_splats`, except that without a comment ``auto`` means z for plain point clouds, as it does
            for PLY meshes.

    Raises:
        ValueError: The file does not exist, is damaged, or has no positions.
    """
    table, axis = read_points_table(path, up)
    means = _columns(path, table, ["x", "y", "z"])
    colors = None
    if {"red", "green", "blue"} <= table.keys():
        kinds = {table[name].dtype for name in ("red", "green", "blue")}
        whole = [np.iinfo(kind).max for kind in kinds if kind.kind in "iu"]
        colors = (_columns(path, table, ["red", "green", "blue"]) / (whole[0] if whole else 1)).clamp(0.0, 1.0)
    elif is_splats(table):
        colors = (0.5 + DC * _columns(path, table, [f"f_dc_{channel}" for channel in range(3)])).clamp(0.0, 1.0)
    return (means if axis == "z" else means[:, [2, 0, 1]].contiguous()), colors


def is_splats(table: dict[str, np.ndarray]) -> bool:
    """Whether a table from :func:`read_points_table` has the properties of Gaussian splats."""
    return {"f_dc_0", "opacity", "scale_0", "rot_0"} <= table.keys()


def read_points_table(path: Path | str, up: Up = "auto") -> tuple[dict[str, np.ndarray], Literal["y", "z"]]:
    """Properties of the points of a PLY file, by name, and the up axis (see :func:`read_splats`).

    The size that the header declares is checked against the length of the file before anything is allocated.

    Raises:
        ValueError: The file does not exist or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the file {path} does not exist: check the path, which is relative to the working directory")
    with path.open("rb") as file:
        head = file.read(_HEADER_LIMIT)
    lines, start = _header(path, head)
    order, count, properties = _layout(path, lines)
    size = path.stat().st_size
    check_file_size(path, MAX_MESH_BYTES, "a point cloud")
    kind = np.dtype([(name, order + code) for name, code in properties])
    if order and count * kind.itemsize > size - start:
        raise ValueError(f"{path.name} is truncated: {count} points need {count * kind.itemsize} bytes of data")
    if count > MAX_POINTS:
        raise ValueError(f"{path.name} has {count:,} points, and at most {MAX_POINTS:,} are read: thin it out first")
    if order:
        rows = np.fromfile(path, dtype=kind, count=count, offset=start)
        table = {name: rows[name] for name, _ in properties}
    else:
        table = _ascii_table(path, start, count, properties)
    if up != "auto":
        return table, up
    comments = [line for line in lines if line.startswith("comment")]
    said = next((axis for line in comments for axis in ("y", "z") if f"{axis} up" in line.lower()), None)
    found = said or ("y" if is_splats(table) else "z")
    return table, "y" if found == "y" else "z"


def _header(path: Path, head: bytes) -> tuple[list[str], int]:
    """Lines of the header, and the position of the data in the file."""
    end = head.find(b"end_header")
    newline = head.find(b"\n", end)
    if not head.startswith(b"ply") or end < 0 or newline < 0:
        raise ValueError(
            f"{path.name} is not a PLY file: it has no header that begins with ply and ends with end_header"
        )
    try:
        text = head[:end].decode("ascii")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not a PLY file: its header is not ASCII text") from None
    return [line.strip() for line in text.splitlines()[1:] if line.strip()], newline + 1


def _layout(path: Path, lines: list[str]) -> tuple[str, int, list[tuple[str, str]]]:
    """Byte order (empty for text), number of points, and (name, type) of their properties."""
    order, count, properties, elements = None, -1, [], 0
    for line in lines:
        words = line.split()
        if words[0] == "format" and len(words) == 3 and words[1] in _FORMATS:
            order = _FORMATS[words[1]]
        elif words[0] == "element" and len(words) == 3 and words[2].isdecimal():
            elements += 1
            if elements == 1 and words[1] == "vertex":
                count = int(words[2])
        elif words[0] == "property" and elements == 1:
            if len(words) != 3 or words[1] not in _TYPES:
                raise ValueError(f"{path.name}: the point property {line!r} is not a scalar of a known type")
            properties.append((words[2], _TYPES[words[1]]))
        elif words[0] not in ("comment", "obj_info", "property"):
            raise ValueError(f"{path.name}: the header line {line[:60]!r} is not valid PLY")
    if order is None or count < 0:
        raise ValueError(f"{path.name}: the header must declare a format and have vertex as its first element")
    names = [name for name, _ in properties]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path.name}: the points have no properties, or two properties with the same name")
    return order, count, properties


def _ascii_table(path: Path, start: int, count: int, properties: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    lines = path.read_bytes()[start:].split(b"\n", count)[:count]
    rows = [line.split() for line in lines]
    if len(rows) < count or any(len(row) != len(properties) for row in rows):
        raise ValueError(
            f"{path.name} is truncated or damaged: it must have {count} lines of {len(properties)} numbers"
        )
    try:
        values = np.array(rows, dtype=np.float64).reshape(count, len(properties))
    except ValueError:
        raise ValueError(f"{path.name} is damaged: some of its data are not numbers") from None
    return {name: values[:, column].astype(code) for column, (name, code) in enumerate(properties)}


def _columns(path: Path | str, table: dict[str, np.ndarray], names: list[str]) -> Tensor:
    """Properties ``names`` as columns (N, len(names)) float32.

    Raises:
        ValueError: A property is missing or has a value that is not finite.
    """
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"{Path(path).name}: the points lack the property {missing[0]}")
    with np.errstate(over="ignore"):  # doubles may become infinite
        values = np.stack([table[name] for name in names], axis=1).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{Path(path).name}: some values of {', '.join(names[:3])} are not finite: repair the file first"
        )
    return torch.from_numpy(values)
