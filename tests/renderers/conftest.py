"""Makes the scenes of the volume renderers' tests importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
