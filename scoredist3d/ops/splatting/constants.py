"""Constants of Gaussian splatting, shared by all backends; the values are those of gsplat."""

from __future__ import annotations

import math

TILE = 16  # pixels along a side of a tile
MAX_ALPHA = 0.999  # below 1, so that the Gaussians behind contribute and 1 / (1 - alpha) is finite
MIN_ALPHA = 1 / 255  # smaller contributions are invisible in an 8-bit image and are skipped
MIN_TRANSMITTANCE = 1e-4  # compositing stops before the Gaussian that would leave no more than this
# Distance in standard deviations at which a Gaussian of opacity 1 falls to MIN_ALPHA.
REACH = math.sqrt(-2 * math.log(MIN_ALPHA))
REACH_SLACK = 1e-5  # added to squared distances, so that rounding never excludes a covered pixel
# Largest slope, in half fields of view, at which the Jacobian of the projection is evaluated: further out, the linear
# approximation of the perspective projection produces huge Gaussians.
FRUSTUM_MARGIN = 1.3
MOMENTS = 6  # gradient columns before the features: mean x, y; conic xx, xy, yy; opacity
