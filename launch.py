"""Entry point of a checkout: ``python launch.py --config configs/quickstart.yaml --train prompt="a red mug"``."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (with an older Python, the imports below fail with an unclear message)
    sys.exit("error: scoredist3d needs Python 3.11 or newer, this is {}.{}".format(*sys.version_info))

from scoredist3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
