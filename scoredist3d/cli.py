"""The command line: train, validate, test, export, list, describe.

Exit codes: 0 done, 1 the run failed or an object has no mesh, 2 a mistake in the command or the configuration, 130
interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from scoredist3d import __version__, registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.custom import custom_folders, load_custom
from scoredist3d.paths import checkout_root, command_name
from scoredist3d.terminal import print_out, tolerate_any_text

OK, RUN_FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130
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


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help for usage")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print ``--help`` and ``--version``."""
        print_out(message, end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every error is one message on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments or os.environ.get("SCOREDIST3D_DEBUG") == "1"
    tolerate_any_text()
    try:
        return _dispatch(_parse_arguments(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    # The outermost frame: whatever failed becomes one message and an exit code.
    except Exception as error:
        if verbose:
            traceback.print_exc()
        missing = missing_dependency(error)
        is_users = isinstance(error, ValueError) or missing is not None
        text = missing or str(error)
        print(f"error: {text}" if is_users else f"error: {type(error).__name__}: {text}", file=sys.stderr)
        if not is_users and not verbose:
            print("(--verbose shows where it happened)", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, ConfigError) else RUN_FAILED


def _dispatch(options: argparse.Namespace) -> int:
    shows = options.list is not None or options.describe is not None
    builds = not shows and not options.dry_run
    named = [_custom_folder(folder) for folder in options.custom]
    failures = load_custom(custom_folders(builds=builds, named=named))
    for failure in failures:
        print(f"warning: {failure}", file=sys.stderr)
    try:
        return _show(options) if shows else _run(options)
    except (ConfigError, registry.UnknownComponentError) as error:
        note = "\n(a custom package could not be loaded, see the warning above)" if failures else ""
        if not builds and "custom" not in options.custom and _has_custom_here():
            note += (
                "\n(only commands that build a run import ./custom; add --custom custom if the name is defined there)"
            )
        raise ConfigError(f"{error}{note}") from error


def missing_dependency(error: BaseException) -> str | None:
    """How to install what an import did not find; None for other errors and for modules of this package."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.partition(".")[0]
    if module in ("scoredist3d", "custom"):
        return None
    source = "-r requirements.txt" if checkout_root() is not None else "scoredist3d"
    return (
        f"the Python package {module} is not installed in {sys.prefix}; install what is missing with "
        f"`{Path(sys.executable).name} -m pip install {source}`"
    )


def _custom_folder(folder: str) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"--custom: there is no folder {folder}; give a folder of Python modules or packages")
    return path


def _has_custom_here() -> bool:
    """Whether the current folder has user packages other than those of the checkout."""
    here, root = Path.cwd() / "custom", checkout_root()
    return here.is_dir() and (root is None or here.resolve() != (root / "custom").resolve())


def _show(options: argparse.Namespace) -> int:
    from scoredist3d.config import describe

    if options.describe is not None:
        kind, slash, name = options.describe.partition("/")
        if not slash or not name:
            raise ConfigError(f"--describe needs KIND/NAME, as in guidance/sds; got {options.describe!r}")
        _check_kind(kind)
        print_out(describe.describe_component(kind, name))
    elif options.list:
        _check_kind(options.list)
        print_out(describe.list_components(options.list))
    else:
        print_out(describe.list_kinds())
    return OK


def _check_kind(kind: str) -> None:
    if kind not in registry.KINDS:
        near = registry.near_matches(kind, list(registry.KINDS))
        raise ConfigError(f"there is no kind {kind!r}.{near} Kinds are {', '.join(registry.KINDS)}")


def _run(options: argparse.Namespace) -> int:
    from scoredist3d.config.loader import merge_layers
    from scoredist3d.config.pipeline import is_pipeline
    from scoredist3d.config.resume import resumed_layers
    from scoredist3d.config.validation import layers_to_yaml, load_plain, to_yaml

    mode = _mode(options)
    devices = parse_devices(options.gpu)
    source = options.resume if mode == "train" else getattr(options, mode) or options.resume
    stages = _pipeline_to_resume(source) if mode == "train" else None
    if stages is not None or (not source and options.config and is_pipeline(merge_layers(options.config))):
        return _run_stages(options, mode, stages, devices)
    checkpoint: Path | None = None
    files = list(options.config)
    if source:
        folder, checkpoint = _find_run(Path(source))
        written = folder / "configs" / "config.yaml"
        files.insert(0, str(written if written.is_file() else folder / "configs" / "resolved.yaml"))
    elif mode != "train" and not options.dry_run:
        raise ConfigError(f"--{mode} needs a trained run: --{mode} outputs/NAME/RUN, or a checkpoint with --resume")
    if not files:
        raise ConfigError(f"--{mode} needs --config FILE, as in --config configs/quickstart.yaml")
    goes_on = source and mode == "train"
    merged = (
        resumed_layers(files[0], files[1:], options.overrides) if goes_on else merge_layers(files, options.overrides)
    )
    config = load_plain(merged)
    if options.dry_run:
        print_out(to_yaml(config), end="")
        return OK
    _check_devices(devices)
    from scoredist3d.training import run

    if mode == "train":
        result = run.run_training(config, devices=devices, resume=checkpoint, source=layers_to_yaml(merged))
    else:
        assert checkpoint is not None
        action = {"validate": run.run_validation, "test": run.run_test, "export": run.run_export}[mode]
        result = action(config, checkpoint, devices=devices)
    return _exit_code(result)


def _run_stages(options: argparse.Namespace, mode: str, resumed: Path | None, devices: list[int] | str) -> int:
    """``--train`` of a pipeline, new or resumed, or its dry run."""
    from scoredist3d.config.pipeline import load_pipeline
    from scoredist3d.config.resume import resumed_stages
    from scoredist3d.config.validation import load_plain, to_yaml
    from scoredist3d.training.folder import PIPELINE_CONFIG, stages_begun

    if mode != "train":
        raise ConfigError(f"--{mode} works on one run: give a stage's folder, --{mode} outputs/NAME/RUN/STAGE")
    files = [*([] if resumed is None else [str(resumed / PIPELINE_CONFIG)]), *options.config]
    pipeline = load_pipeline(files, options.overrides)
    if options.dry_run:
        layers = resumed_stages(pipeline, {} if resumed is None else stages_begun(resumed))
        stages = (f"# stage {name}\n{to_yaml(load_plain(merged))}" for name, merged in layers.items())
        print_out("---\n".join(stages), end="")
        return OK
    _check_devices(devices)
    from scoredist3d.training.pipeline import run_pipeline

    result = run_pipeline(pipeline, devices=devices, resume=resumed)
    return _exit_code(result)


def _exit_code(result: Any) -> int:
    """Of a run that came to its end, or was stopped by a signal on the way."""
    if result.interrupted:
        return INTERRUPTED
    return OK if result.error is None else RUN_FAILED


def _pipeline_to_resume(named: str | None) -> Path | None:
    """The pipeline's folder that a user names with ``--resume``, if it is one."""
    from scoredist3d.training.folder import PIPELINE_CONFIG

    folder = Path(named or "")
    return folder if named and (folder / PIPELINE_CONFIG).is_file() else None


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    command = command_name()
    parser = _Parser(
        prog=command,
        description="Text to 3D by score distillation.",
        usage=f"{command} --config FILE [...] --train|--validate RUN|--test RUN|--export RUN [key.path=value ...]",
        epilog=_EPILOG.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="FILE", help="YAML files; later ones win"
    )
    parser.add_argument("--train", action="store_true", help="optimise, then test and export")
    for mode, text in (
        ("validate", "render views of"),
        ("test", "render the turntable of"),
        ("export", "write meshes of"),
    ):
        parser.add_argument(
            f"--{mode}", nargs="?", const="", metavar="RUN", help=f"{text} a run's folder or checkpoint"
        )
    parser.add_argument("--resume", metavar="RUN", help="run folder or checkpoint to go on from; its config is used")
    parser.add_argument(
        "--gpu",
        metavar="IDS",
        help="'0', '0,1', ..., 'cpu' or 'cpu:2' (processes); when left out, the first GPU or else the CPU",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the full config that would run, and stop")
    parser.add_argument("--list", nargs="?", const="", metavar="KIND", help="kinds, or the components of a kind")
    parser.add_argument("--describe", metavar="KIND/NAME", help="the fields of a component")
    parser.add_argument(
        "--custom",
        action="append",
        default=[],
        metavar="FOLDER",
        help="import user packages from FOLDER; commands that build a run always import ./custom",
    )
    parser.add_argument("--version", action="version", version=f"scoredist3d {__version__}")
    parser.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):  # undecodable bytes
            raise ConfigError(f"{argument!r} is not valid text in this terminal's encoding; use UTF-8")
    options, rest = parser.parse_known_args(arguments)
    flags = [item for item in rest if item.startswith("-")]
    if flags:
        known = [name for action in parser._actions for name in action.option_strings]
        raise ConfigError(
            f"unknown option {flags[0]}.{registry.near_matches(flags[0], known)} --help shows all of them"
        )
    options.overrides = []
    # `--config a.yaml key=value` and `--export key=value`: the option has swallowed an override.
    options.config, swallowed = (
        [f for f in options.config if not _is_override(f)],
        [*filter(_is_override, options.config)],
    )
    for mode in MODES[1:]:
        if _is_override(getattr(options, mode) or ""):
            swallowed.append(getattr(options, mode))
            setattr(options, mode, "")
    stray = [item for item in rest if "=" not in item]
    if stray:
        raise ConfigError(
            f'{stray[0]!r} is neither an option nor key.path=value; a prompt is given as prompt="{stray[0]}"'
        )
    options.overrides = [*swallowed, *rest]
    return options


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _mode(options: argparse.Namespace) -> str:
    chosen = ["train"] * options.train + [mode for mode in MODES[1:] if getattr(options, mode) is not None]
    if len(chosen) > 1:
        raise ConfigError(
            f"give one of --train, --validate, --test, --export, not {' and '.join('--' + m for m in chosen)}"
        )
    if not chosen and not options.dry_run:
        raise ConfigError(
            "say what to do: one of --train, --validate, --test, --export, --list, --describe; --help shows how"
        )
    return chosen[0] if chosen else "train"


def parse_devices(text: str | None) -> list[int] | str:
    """``--gpu``: GPU indices, ``"cpu"``, ``"cpu:2"`` (processes), or ``"auto"`` where it is not given.

    Raises:
        ConfigError: Anything else, or a GPU named twice.
    """
    if text is None:
        return "auto"
    if text == "cpu" or re.fullmatch(r"cpu:[1-9]\d*", text):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--gpu wants different GPU numbers, as in 0 or 0,1, or cpu; got {text!r}")
    return [int(part) for part in parts]


def _check_devices(devices: list[int] | str) -> None:
    if isinstance(devices, str):
        return
    import torch

    count = torch.cuda.device_count()
    absent = [index for index in devices if index >= count]
    if absent:
        have = f"has GPUs 0 to {count - 1}" if count else "has no usable GPU (CUDA); use --gpu cpu"
        raise ConfigError(f"--gpu: there is no GPU {absent[0]}, this machine {have}")


def _find_run(path: Path) -> tuple[Path, Path]:
    """Folder and checkpoint of what a user names: a run, a checkpoint, or a folder of runs (then the newest)."""
    from scoredist3d.training.folder import find_run

    runs = _runs_below(path)
    if not path.exists():
        known = [str(run) for run in _runs_below(Path("outputs"))[:3]]
        raise ConfigError(f"run {path} does not exist.{' Newest runs: ' + ', '.join(known) if known else ''}")
    if runs:
        if len(runs) > 1:
            print(f"{path} holds {len(runs)} runs; taking the newest, {runs[0]}", file=sys.stderr)
        path = runs[0]
    try:
        folder, checkpoint = find_run(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return folder.root, checkpoint


def _runs_below(path: Path) -> list[Path]:
    """Runs in the sub-folders of ``path``, the newest first; none if ``path`` is a run itself."""
    if (path / "configs" / "resolved.yaml").is_file():
        return []
    found = [*path.glob("*/configs/resolved.yaml"), *path.glob("*/*/configs/resolved.yaml")]
    return [file.parents[1] for file in sorted(found, key=lambda file: (file.stat().st_mtime, str(file)), reverse=True)]


if __name__ == "__main__":
    sys.exit(main())
