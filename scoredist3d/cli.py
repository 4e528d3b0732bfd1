"""The command line: train, validate, test, export, list, describe.

Exit codes: 0 success, 1 the run failed or an object has no mesh, 2 an error in the command or the configuration,
128 + n interrupted by signal n (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scoredist3d import registry
from scoredist3d.arguments import MODES, parser
from scoredist3d.config.errors import MAX_MESSAGE, ConfigError, brief
from scoredist3d.custom import custom_folders, load_custom
from scoredist3d.paths import checkout_root
from scoredist3d.reasons import ExplainedError, reason
from scoredist3d.signals import SignalReceived, signals_end_command
from scoredist3d.terminal import print_out, tolerate_any_text

OK, RUN_FAILED, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130
LONGEST_MESSAGE = 4 * MAX_MESSAGE
"""Largest number of characters of an error, which may quote a file from others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; an error is printed as one message on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments or os.environ.get("SCOREDIST3D_DEBUG") == "1"
    tolerate_any_text()
    try:
        with signals_end_command():
            return _dispatch(_parse_arguments(arguments))
    except KeyboardInterrupt as interrupt:
        print_out("interrupted", stream=sys.stderr)
        return interrupt.exit_code if isinstance(interrupt, SignalReceived) else INTERRUPTED
    # Outermost frame: any error becomes one message and an exit code.
    except Exception as error:
        if verbose:
            traceback.print_exc()
        missing = missing_dependency(error)
        is_users = isinstance(error, (ValueError, OSError, ExplainedError)) or missing is not None
        print(f"error: {brief(missing or reason(error), LONGEST_MESSAGE)}", file=sys.stderr)
        if not is_users and not verbose:
            print("(--verbose prints the traceback)", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, ConfigError) else RUN_FAILED


def _dispatch(options: argparse.Namespace) -> int:
    """Import the user packages and run the command; returns the exit code."""
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
                "\n(only commands that build a run import ./custom; if the name is defined there, add --custom custom)"
            )
        raise ConfigError(brief(str(error), MAX_MESSAGE - len(note)) + note) from error


def missing_dependency(error: BaseException) -> str | None:
    """Installation instructions for a missing package; None for other errors and for modules of this package."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.partition(".")[0]
    if module in ("scoredist3d", "custom"):
        return None
    source = "-r requirements.txt" if checkout_root() is not None else "scoredist3d"
    return (
        f"the Python package {module} is not installed in {sys.prefix}; install the missing packages with "
        f"`{Path(sys.executable).name} -m pip install {source}`"
    )


def _custom_folder(folder: str) -> Path:
    """The folder given with ``--custom``.

    Raises:
        ConfigError: The folder does not exist.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"--custom: there is no folder {folder}; give a folder of Python modules or packages")
    return path


def _has_custom_here() -> bool:
    """Whether the current folder contains a ``custom`` folder other than the one in the checkout."""
    here, root = Path.cwd() / "custom", checkout_root()
    return here.is_dir() and (root is None or here.resolve() != (root / "custom").resolve())


def _show(options: argparse.Namespace) -> int:
    """Run ``--list`` or ``--describe``; returns the exit code."""
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
        raise ConfigError(f"unknown kind {kind!r}.{near} The kinds are {', '.join(registry.KINDS)}")


def _run(options: argparse.Namespace) -> int:
    """Train, validate, test or export; returns the exit code."""
    from scoredist3d.config.loader import merge_layers
    from scoredist3d.config.pipeline import is_pipeline
    from scoredist3d.config.resume import resumed_layers
    from scoredist3d.config.validation import layers_to_yaml, load_plain, to_yaml
    from scoredist3d.prompts.wording import check_prompts

    mode = _mode(options)
    _check_allowed(options.allow_change, resumes=mode == "train" and bool(options.resume))
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
    resumes = source and mode == "train"
    merged = (
        resumed_layers(files[0], files[1:], options.overrides) if resumes else merge_layers(files, options.overrides)
    )
    config = load_plain(merged)
    if options.dry_run:
        if not source:  # an existing run keeps its prompt
            check_prompts([config])
        print_out(to_yaml(config), end="")
        return OK
    _check_devices(devices)
    from scoredist3d.training import run

    if mode == "train":
        result = run.run_training(
            config,
            devices=devices,
            resume=checkpoint,
            source=layers_to_yaml(merged),
            allow_change=options.allow_change,
        )
    else:
        assert checkpoint is not None
        action = {"validate": run.run_validation, "test": run.run_test, "export": run.run_export}[mode]
        result = action(config, checkpoint, devices=devices)
    return _exit_code(result)


def _run_stages(options: argparse.Namespace, mode: str, resumed: Path | None, devices: list[int] | str) -> int:
    """Train a pipeline, new or resumed, or print its configuration; returns the exit code."""
    from scoredist3d.config.pipeline import load_pipeline
    from scoredist3d.config.resume import resumed_stages
    from scoredist3d.config.validation import load_plain, to_yaml
    from scoredist3d.prompts.wording import check_prompts
    from scoredist3d.training.folder import PIPELINE_CONFIG, stages_begun

    if mode != "train":
        raise ConfigError(
            f"--{mode} needs one run, not a pipeline: give the folder of a stage, --{mode} outputs/NAME/RUN/STAGE"
        )
    files = [*([] if resumed is None else [str(resumed / PIPELINE_CONFIG)]), *options.config]
    pipeline = load_pipeline(files, options.overrides)
    if options.dry_run:
        check_prompts(pipeline.stages.values())
        layers = resumed_stages(pipeline, {} if resumed is None else stages_begun(resumed))
        stages = (f"# stage {name}\n{to_yaml(load_plain(merged))}" for name, merged in layers.items())
        print_out("---\n".join(stages), end="")
        return OK
    _check_devices(devices)
    from scoredist3d.training.pipeline import run_pipeline

    result = run_pipeline(pipeline, devices=devices, resume=resumed, allow_change=options.allow_change)
    return _exit_code(result)


def _exit_code(result: Any) -> int:
    """The exit code of a run that ended, failed or was interrupted by a signal."""
    if result.interrupted:
        return 128 + result.signal if result.signal else INTERRUPTED
    return OK if result.error is None else RUN_FAILED


def _pipeline_to_resume(named: str | None) -> Path | None:
    """The pipeline given with ``--resume``, itself or as the newest run in a folder of runs, else None."""
    from scoredist3d.training.folder import PIPELINE_CONFIG, runs_below

    if not named:
        return None
    folder = Path(named)
    newest = next((stage.parent for stage in runs_below(folder)), folder)
    if not (newest / PIPELINE_CONFIG).is_file():
        return None
    if newest != folder:
        print(f"the newest run in {folder} is the pipeline {newest}, which continues", file=sys.stderr)
    return newest


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Options and overrides of a command line.

    Raises:
        ConfigError: An unknown option, or an argument that is neither an option nor ``key.path=value``.
    """
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):  # undecodable bytes
            raise ConfigError(f"{argument!r} is not valid text in this terminal's encoding; use UTF-8")
    options, rest = parser().parse_known_args(arguments)
    flags = [item for item in rest if item.startswith("-")]
    if flags:
        known = [name for action in parser()._actions for name in action.option_strings]
        raise ConfigError(
            f"unknown option {flags[0]}.{registry.near_matches(flags[0], known)} --help lists all options"
        )
    # In `--config a.yaml key=value` and `--export key=value`, argparse assigns the override to the option.
    files: list[str] = []
    swallowed: list[str] = []
    for item in options.config:
        (swallowed if _is_override(item) else files).append(item)
    options.config = files
    for mode in MODES[1:]:
        if _is_override(getattr(options, mode) or ""):
            swallowed.append(getattr(options, mode))
            setattr(options, mode, "")
    stray = [item for item in rest if "=" not in item]
    if stray:
        raise ConfigError(
            f'{stray[0]!r} is neither an option nor key.path=value; write a prompt as prompt="{stray[0]}"'
        )
    options.overrides = [*swallowed, *rest, *(["prior.allow_unknown_nouns=true"] if options.anyway else [])]
    return options


def _is_override(text: str) -> bool:
    """Whether an argument is ``key.path=value`` rather than an existing file."""
    return "=" in text and not Path(text).exists()


def _mode(options: argparse.Namespace) -> str:
    """The mode, one of :data:`MODES`; a dry run without a mode counts as training.

    Raises:
        ConfigError: No mode or several modes are given.
    """
    chosen = ["train"] * options.train + [mode for mode in MODES[1:] if getattr(options, mode) is not None]
    if len(chosen) > 1:
        raise ConfigError(
            f"give one of --train, --validate, --test, --export, not {' and '.join('--' + m for m in chosen)}"
        )
    if not chosen and not options.dry_run:
        raise ConfigError(
            "no action given: add --train, --validate, --test, --export, --list or --describe; see --help for usage"
        )
    return chosen[0] if chosen else "train"


def parse_devices(text: str | None) -> list[int] | str:
    """The devices given with ``--gpu``: GPU indices, ``"cpu"`` or ``"cpu:2"`` (processes); ``"auto"`` for None.

    Raises:
        ConfigError: The text is none of these, or names a GPU twice.
    """
    if text is None:
        return "auto"
    if text == "cpu" or re.fullmatch(r"cpu:[1-9]\d*", text):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--gpu must be cpu or distinct GPU numbers, such as 0 or 0,1; got {text!r}")
    return [int(part) for part in parts]


def _check_devices(devices: list[int] | str) -> None:
    """Check that the GPUs exist.

    Raises:
        ConfigError: A GPU does not exist.
    """
    if isinstance(devices, str):
        return
    import torch

    count = torch.cuda.device_count()
    absent = [index for index in devices if index >= count]
    if absent:
        have = f"has GPUs 0 to {count - 1}" if count else "has no usable CUDA GPU; use --gpu cpu"
        raise ConfigError(f"--gpu: GPU {absent[0]} does not exist; this machine {have}")


def _check_allowed(keys: list[str], *, resumes: bool) -> None:
    """Check the keys given with ``--allow-change``, which may begin with ``stages.NAME.``.

    Raises:
        ConfigError: A key is not one that the option applies to, or no run is resumed.
    """
    from scoredist3d.config.resume import GUARDED_KEYS

    if keys and not resumes:
        raise ConfigError("--allow-change applies to --train --resume RUN only; remove it")
    for key in keys:
        if re.sub(r"^stages\.[^.]+\.", "", key) not in GUARDED_KEYS:
            raise ConfigError(
                f"--allow-change: {key!r} is not one of {', '.join(GUARDED_KEYS)}; other keys may change anyway"
            )


def _find_run(path: Path) -> tuple[Path, Path]:
    """Run folder and checkpoint for a path to a run, a checkpoint or a folder of runs (the newest run is used)."""
    from scoredist3d.training.folder import find_run, runs_below

    runs = runs_below(path)
    if not path.exists():
        known = [str(run) for run in runs_below(Path("outputs"))[:3]]
        raise ConfigError(f"run {path} does not exist.{' Newest runs: ' + ', '.join(known) if known else ''}")
    if runs:
        if len(runs) > 1:
            print(f"{path} contains {len(runs)} runs; using the newest, {runs[0]}", file=sys.stderr)
        path = runs[0]
    try:
        folder, checkpoint = find_run(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return folder.root, checkpoint


if __name__ == "__main__":
    sys.exit(main())
