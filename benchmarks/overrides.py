"""Config overrides among the arguments of a benchmark."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence


def split_overrides(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Options of the benchmark, and overrides of the form key=value, wherever they stand.

    They are separated before the options are parsed, because an option with several values, such as ``--prompts``,
    takes everything up to the next option.

    Args:
        argv: Arguments of the command; None stands for those of the process.
    """
    given = sys.argv[1:] if argv is None else argv
    overrides = [item for item in given if re.match(r"[\w.]+=", item)]
    return [item for item in given if item not in overrides], overrides
