"""scoredist3d: text-to-3D by score distillation.

Importing the package is cheap: it sets one environment variable and loads no device, no torch and no optional package.
Components live in sub-packages named after their kind (``scoredist3d.guidance``, ``scoredist3d.geometry``, ...) and are
found through :mod:`scoredist3d.registry`. The functions below are loaded at first use.

* :func:`build`: from the ``Config`` of a component to the component.
* :func:`fit`: optimise a system that was built in Python.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scoredist3d.config.building import build
    from scoredist3d.training.plain_loop import fit

# Waiting OpenMP threads must sleep, not spin: with another process busy on a 2-core machine, libgomp's spinning
# barriers made a small UNet 38 times slower. The variable is read when torch loads, so it is set before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["__version__", "build", "fit"]

_LAZY = {"build": "scoredist3d.config.building", "fit": "scoredist3d.training.plain_loop"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
