"""The argument parser of the command line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from scoredist3d import __version__
from scoredist3d.config.fields import ConfigError
from scoredist3d.paths import command_name
from scoredist3d.terminal import print_out

MODES = ("train", "validate", "test", "export")

_EPILOG = """examples:
  {command} --config configs/quickstart.yaml --train prompt="a red mug"
  {command} --config configs/quickstart.yaml --train --dry-run prompt="a red mug" trainer.max_steps=100
  {command} --config configs/pipeline/magic3d.yaml --train prompt="a red mug"
  {command} --train --resume outputs/quickstart
  {command} --export outputs/quickstart
  {command} --list guidance
  {command} --describe guidance/sds
"""


class Parser(argparse.ArgumentParser):
    """Argument parser that raises an error instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`ConfigError`."""
        raise ConfigError(f"{message}; see --help for usage")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the output of ``--help`` and ``--version``."""
        print_out(message, end="")


def parser() -> Parser:
    """The argument parser, without overrides."""
    command = command_name()
    result = Parser(
        prog=command,
        description="Text to 3D by score distillation.",
        usage=f"{command} --config FILE [...] --train|--validate RUN|--test RUN|--export RUN [key.path=value ...]",
        epilog=_EPILOG.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add(
        "--config", nargs="+", action="extend", default=[], metavar="FILE", help="YAML files; later files take priority"
    )
    add("--train", action="store_true", help="optimize, then test and export")
    for mode, text in (
        ("validate", "render preview images of a run"),
        ("test", "render the turntable video of a run"),
        ("export", "write the 3D files of a run"),
    ):
        add(f"--{mode}", nargs="?", const="", metavar="RUN", help=f"{text}, given as a run folder or checkpoint")
    add("--resume", metavar="RUN", help="run folder or checkpoint to continue from, with its configuration")
    add(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="let a resumed run change seed or prompt, or set trainer.max_steps below the finished steps (repeatable)",
    )
    add(
        "--gpu",
        metavar="IDS",
        help="'0', '0,1', ..., 'cpu' or 'cpu:2' (processes); default: the first GPU if there is one, else the CPU",
    )
    add("--anyway", action="store_true", help="train on a prompt that names no kind of object known to the prior")
    add("--dry-run", action="store_true", help="print the complete configuration of the run and exit")
    add("--list", nargs="?", const="", metavar="KIND", help="list the kinds of components, or the components of a kind")
    add("--describe", metavar="KIND/NAME", help="list the fields of a component")
    add(
        "--custom",
        action="append",
        default=[],
        metavar="FOLDER",
        help="import user packages from FOLDER; commands that build a run always import ./custom",
    )
    add("--version", action="version", version=f"scoredist3d {__version__}")
    add("--verbose", action="store_true", help="print the traceback of an error")
    return result
