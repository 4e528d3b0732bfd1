"""Entry point of ``python -m scoredist3d``, which is equivalent to the command ``scoredist3d``."""

import sys

from scoredist3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
