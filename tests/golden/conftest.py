"""Makes the cases beside these tests importable, and imports Lightning, whose first import draws from ``random``."""

import sys
from pathlib import Path

from scoredist3d.training.fit import import_lightning

sys.path.insert(0, str(Path(__file__).parent))
import_lightning()
