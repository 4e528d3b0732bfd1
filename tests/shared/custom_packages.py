"""User packages that a test has imported."""

import sys


def forget_custom() -> None:
    """Take every ``custom`` module out of ``sys.modules``, so that the next test imports its own."""
    for name in [name for name in sys.modules if name == "custom" or name.startswith("custom.")]:
        del sys.modules[name]
