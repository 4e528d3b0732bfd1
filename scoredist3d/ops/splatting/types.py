"""Types shared by the steps and backends of Gaussian splatting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoredist3d.ops.splatting.constants import TILE


@dataclass(frozen=True)
class ProjectedGaussians:
    """N 3D Gaussians in the image planes of B cameras.

    Attributes:
        means2d: (B, N, 2), pixels from the top left corner, x right and y down; the center of the first pixel is at
            (0.5, 0.5). Call ``means2d.retain_grad()`` before splatting to read its gradient for densification: it is
            per pixel; multiply it by half the image width for the gradient in normalized device coordinates, as in the
            paper.
        conics: (B, N, 3), inverse covariance (xx, xy, yy), per square pixel.
        depth: (B, N), distance along the viewing axis, scene units.
        radius: (B, N), distance in pixels, along the major axis, at which a Gaussian of opacity 1 falls to 1/255; 0 if
            the Gaussian is not visible.
        stds: (B, N, 2), standard deviations along x and y, pixels.
        visible: (B, N) bool, whether the Gaussian is in front of the near plane and reaches the image.
        compensation: (B, N), factor on the opacities that offsets the opacity added by dilation; None without
            antialiasing.
    """

    means2d: Tensor
    conics: Tensor
    depth: Tensor
    radius: Tensor
    stds: Tensor
    visible: Tensor
    compensation: Tensor | None = None

    @property
    def count(self) -> Tensor:
        """(N,) int64, number of cameras in which each Gaussian is visible."""
        return self.visible.sum(dim=0)


@dataclass(frozen=True)
class SplattedImages:
    """Images composited from Gaussians, with w_i the compositing weight of Gaussian i at a pixel.

    Attributes:
        color: (B, H, W, C), sum_i w_i color_i; premultiplied: over a background b it is ``color + (1 - opacity) b``.
        opacity: (B, H, W, 1), sum_i w_i.
        depth: (B, H, W, 1), sum_i w_i depth_i; premultiplied.
    """

    color: Tensor
    opacity: Tensor
    depth: Tensor


@dataclass(frozen=True)
class ProjectionSettings:
    """Image size and parameters of a projection.

    Attributes:
        height, width: Pixels.
        near: Depth of the near plane, scene units.
        dilation: Added to the image-plane variances, square pixels.
        antialiased: Whether the compensation for the dilation is computed.
    """

    height: int
    width: int
    near: float
    dilation: float
    antialiased: bool


@dataclass(frozen=True)
class Gaussians2D:
    """2D Gaussians with features, the input of compositing: M = B N Gaussians, camera by camera.

    Attributes:
        means: (M, 2), pixels.
        conics: (M, 3), inverse covariance (xx, xy, yy), per square pixel.
        features: (M, K), values to composite.
        opacities: (M,).
    """

    means: Tensor
    conics: Tensor
    features: Tensor
    opacities: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means, conics, features, opacities."""
        return self.means, self.conics, self.features, self.opacities


@dataclass(frozen=True)
class TileLists:
    """Gaussians that touch each image tile, sorted by depth.

    An entry is a pair of a tile and a Gaussian. Entries are ordered by tile and, within a tile, from near to far. For
    the backward pass each entry also has a row in a gradient buffer that is ordered by Gaussian: summing the rows of a
    Gaussian in order needs no atomics and gives bit-identical results.

    Attributes:
        gaussians: (P,) int64, Gaussian of each entry, in [0, M).
        rows: (P,) int64, row of each entry.
        offsets: (T + 1,) int64, first entry of each tile; tiles are in row-major order, image by image.
        row_offsets: (M + 1,) int64, Gaussian j has the rows from ``row_offsets[j]`` up to ``row_offsets[j + 1]``.
        batch: B, number of images.
        height, width: Pixels.
    """

    gaussians: Tensor
    rows: Tensor
    offsets: Tensor
    row_offsets: Tensor
    batch: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int]:
        """Number of tiles in an image: (down, across)."""
        return -(-self.height // TILE), -(-self.width // TILE)

    def __len__(self) -> int:
        return self.gaussians.shape[0]
