"""Makes the table of methods that the tests of guidance use importable here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "guidance"))
