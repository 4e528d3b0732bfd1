"""Start here: ``python launch.py --config configs/quickstart.yaml --train prompt="a red mug"``."""

import sys

from scoredist3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
