"""Makes the cases beside these tests importable, and Lightning's first import, which draws from ``random``, harmless."""

import sys
from pathlib import Path

from scoredist3d.training.fit import import_lightning

sys.path.insert(0, str(Path(__file__).parent))
import_lightning()
