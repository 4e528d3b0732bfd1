"""Limits on the size of files that come from others, and on numbers in configurations that determine memory.

Files beyond a limit are rejected before they are decoded. The limits are far above anything that a run needs and small
enough for a workstation; ``SECURITY.md`` lists them.
"""

from __future__ import annotations

from pathlib import Path

MIB = 1024**2
GIB = 1024**3

# Files.
MAX_CONFIG_BYTES = MIB
MAX_CONFIG_VALUES = 100_000
"""Values of a configuration file or an override after the expansion of its YAML aliases."""
MAX_CONFIG_DEPTH = 60
"""Levels of nested blocks and lists in a configuration."""
MAX_INTERPOLATED = 300_000
"""Characters and values that all interpolations of a configuration produce together."""
MAX_INTERPOLATION_CHAIN = 40
"""Interpolations that refer to each other in a chain."""
MAX_INTERPOLATION_TEXT = 20_000
"""Characters of a text that contains an interpolation."""
MAX_MESH_BYTES = 2 * GIB
MAX_FACES = 20_000_000
"""Triangles of a mesh file, counted once for each time that the scene places them."""
MAX_POINTS = 20_000_000
"""Points of a point cloud, and Gaussians."""
MAX_IMAGE_SIDE = 16384
MAX_IMAGE_BYTES = 2 * GIB
MAX_PICKLE_BYTES = 64 * MIB
"""The pickle inside of a checkpoint, which holds everything but the values of its tensors."""
MAX_JSON_BYTES = 64 * MIB
"""Index and configuration files of a model folder."""
MAX_TRAIN_TIMESTEPS = 100_000
"""Training timesteps in the scheduler configuration of a model folder."""

MAX_METRICS_BYTES = 256 * MIB
"""``metrics.csv`` of a run that is resumed: about a million rows."""

# Texts in configurations.
MAX_TEXT = 4096
"""Characters of a prompt, a path or another text."""
MAX_LABEL = 200
"""Characters of a name that the user chooses for a block, such as that of a method in a comparison."""

# Numbers in configurations.
MAX_BATCH = 4096
"""Images, particles or patches that are processed together."""
MAX_RENDER_SIDE = 4096
MAX_STEP_PIXELS = 2**28
"""Pixels of all images of a step."""
MAX_FRAMES = 10_000
MAX_GRID_RESOLUTION = 1024
"""Samples along each side of a dense grid."""
MAX_HASH_RESOLUTION = 65_536
"""Vertices along each axis of the finest level of a hash grid, whose tables are limited separately."""
MAX_WIDTH = 8192
"""Units of a layer."""
MAX_FEATURES = 1024
MAX_SAMPLES = 16 * MIB
"""Points or rays that are evaluated together."""
MAX_STORED_LATENTS = 100_000
MAX_VIEWS = 1_000_000


def check_file_size(path: Path, limit: int, what: str) -> None:
    """Check the size of a file before it is read.

    Raises:
        ValueError: The file has more than ``limit`` bytes; ``what`` names the kind of file in the message.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} is too large: it has {size:,} bytes, and {what} may have at most {limit:,}")
