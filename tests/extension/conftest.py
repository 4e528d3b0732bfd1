"""Imports Lightning, whose first import draws from the global stream of ``random``."""

from scoredist3d.training.fit import import_lightning

import_lightning()
