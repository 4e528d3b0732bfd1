"""Start here: ``python launch.py --config configs/quickstart.yaml --train prompt="a red mug"``."""

import sys

if sys.version_info < (3, 11):
    sys.exit("error: scoredist3d needs Python 3.11 or newer, and this is %d.%d" % sys.version_info[:2])

from scoredist3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
