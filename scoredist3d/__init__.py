"""scoredist3d: text-to-3D by score distillation.

Importing the package is cheap: it sets one environment variable and loads no device, no torch and no optional package.
Components live in sub-packages named after their kind (``scoredist3d.guidance``, ``scoredist3d.geometry``, ...) and are
found through :mod:`scoredist3d.registry`.
"""

import os

# Waiting OpenMP threads must sleep, not spin: with another process busy on a 2-core machine, libgomp's spinning
# barriers made a small UNet 38 times slower. The variable is read when torch loads, so it is set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
