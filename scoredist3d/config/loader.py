"""Merging of YAML files and overrides into one plain dictionary.

Layers are merged in this order, and later ones take precedence: the files of ``include:``, the file itself, further
files, and the command-line overrides, which form one layer. A layer that changes the ``type`` of a block discards the
keys of the block in earlier layers, since those keys belong to another class. Interpolations ``${...}`` are resolved
after the last layer. This module does not check whether keys exist; see :mod:`scoredist3d.config.walker`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scoredist3d import registry
from scoredist3d.config.coercion import MISSING_MARK, is_bare, shown
from scoredist3d.config.errors import ConfigError
from scoredist3d.config.interpolation import escape_interpolations, resolve
from scoredist3d.config.yaml_text import YamlProblem, parse_yaml
from scoredist3d.files import read_text
from scoredist3d.limits import MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH, check_file_size
from scoredist3d.paths import is_file, renamed_config, shipped_root
from scoredist3d.reasons import os_reason
from scoredist3d.registry import near_matches, report_alias, same_component

STAGES = "stages"
MAX_INCLUDES = 500
"""Largest number of files that one config file includes, directly and indirectly."""
# Overrides of these keys are literal text: `prompt=a mug: blue` is a sentence, not a YAML mapping.
TEXT_KEYS = ("prompt", "negative_prompt", "name", "tag")
# Paths of mappings in which an entry may be a bare value instead of a block, and the key of the block that this value
# sets. Such entries are expanded to blocks before merging.
SHORTHANDS: dict[tuple[str, ...], str] = {("system", "loss"): "weight"}
NAMED_MODELS: dict[tuple[str, ...], tuple[str, str]] = {("prior",): ("diffusers", "pretrained_model_name_or_path")}
"""Blocks for which a bare name is enough: the type and the key of the name of a model, as in ``prior: embedded``.

A bare name that is a registered type stands for the block of this type."""


def load(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged and resolved content of config files and overrides.

    Args:
        files: YAML files; later ones take precedence. A relative path is looked up in the working directory and its
            ``configs/``, then among the recipes that ship with the program.
        overrides: Strings ``key.path=value``, where ``value`` is YAML; list items are addressed by index (``a.b.0=1``).

    Returns:
        Plain dicts, lists and scalars. Values ``???`` are kept, and the validator reports them as missing.

    Raises:
        ConfigError: A file is missing, includes itself or is not valid YAML; an override is malformed; or an
            interpolation refers to a key that does not exist.
    """
    return resolve(merge_layers(files, overrides))


def merge_layers(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged content before interpolations are resolved; for arguments and errors, see :func:`load`."""
    merged: dict[str, Any] = {}
    for file in files:
        for layer in _file_layers(find_config(file), ()):
            merged = merge(merged, layer)
    result: dict[str, Any] = merge(merged, parse_overrides(overrides))
    return result


def find_config(file: str | Path) -> Path:
    """The path of the existing config file that ``file`` refers to.

    Raises:
        ConfigError: There is no such file; the message names similar files.
    """
    file = Path(file)
    places = [Path.cwd(), Path.cwd() / "configs", shipped_root(), shipped_root() / "configs"]
    for place in places:
        if is_file(place / file):
            return place / file
    renamed = renamed_config(file)
    if renamed is not None:
        report_alias(f"config file {file}", str(renamed))
        return find_config(renamed)
    if is_file(file, folder=True):
        raise ConfigError(f"config file {file} is a folder; give the path of a YAML file")
    raise ConfigError(f"config file {file} does not exist.{_similar_files(file)}")


def merge(base: Any, layer: Any, path: tuple[str, ...] = ()) -> Any:
    """``layer`` merged over ``base``; neither is modified.

    Mappings are merged key by key; other values are replaced.
    """
    layer = _expand_shorthands(layer, path)
    if isinstance(base, list) and isinstance(layer, dict) and layer and all(_is_index(key) for key in layer):
        return _merge_list(base, layer, path)
    if not isinstance(base, dict) or not isinstance(layer, dict):
        base = {}
        if not isinstance(layer, dict):
            return copy.deepcopy(layer)
    if "type" in base and "type" in layer and not same_component(base["type"], layer["type"]):
        base = {}
    result = copy.deepcopy(base)
    for key, value in layer.items():
        result[key] = merge(result.get(key), value, (*path, str(key)))
    return result


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The layer that override strings ``key.path=value`` describe.

    Raises:
        ConfigError: An override has no ``=``, an empty key, or a value that is not YAML.
    """
    layer: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().replace("[", ".").replace("]", "").split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {shown(override)} is not of the form key.path=value")
        if len(parts) > MAX_CONFIG_DEPTH:
            raise ConfigError(f"override {shown(override)} has more than {MAX_CONFIG_DEPTH} keys; check the dots in it")
        block = layer
        for part in parts[:-1]:
            if not isinstance(block.get(part), dict):
                block[part] = {}
            block = block[part]
        block[parts[-1]] = _override_value(override, parts, text)
    return layer


def _override_value(override: str, parts: list[str], text: str) -> Any:
    if len(parts) == 1 and parts[0] in TEXT_KEYS:
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]
        return escape_interpolations(text[1:-1] if quoted else text)
    try:
        return parse_yaml(text)
    except YamlProblem as problem:
        value = "the value is " if str(problem).startswith("not valid") else ""
        raise ConfigError(f"override {shown(override)}: {value}{problem}") from None


def _file_layers(file: Path, chain: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The layers of one file and its includes, in merge order; ``chain`` lists the including files, outermost first."""
    file = file.resolve()
    if file in chain:
        trail = " -> ".join(_short(link) for link in (*chain[chain.index(file) :], file))
        raise ConfigError(f"include cycle: {trail}; remove one of these includes")
    own = _read_yaml(file)
    layers: list[dict[str, Any]] = []
    for name in _includes(own, file, "include"):
        layers += _included(name, file, chain)
        if len(layers) > MAX_INCLUDES:
            raise ConfigError(f"{_short(file)}: include reads more than {MAX_INCLUDES} files; remove some")
    stages = own.pop(STAGES, None)
    layers.append(_with_parts(own, file, chain, ()))
    if isinstance(stages, dict):
        layers.append({STAGES: {name: _stage(block, file, chain, str(name)) for name, block in stages.items()}})
    elif stages is not None:
        raise ConfigError(f"{_short(file)}: {STAGES} must be a mapping with one block per stage, got {shown(stages)}")
    return layers


def _includes(block: dict[str, Any], file: Path, key: str) -> list[str]:
    """The files listed under ``include`` in a block; the key is removed from the block."""
    includes = block.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{_short(file)}: {key} must be a file or a list of files, got {shown(includes)}")
    return includes


def _included(name: str, file: Path, chain: tuple[Path, ...]) -> list[dict[str, Any]]:
    return _file_layers(_find_include(name, file, chain), (*chain, file))


def _stage(block: Any, file: Path, chain: tuple[Path, ...], name: str) -> dict[str, Any]:
    """One stage of a pipeline: its block merged over the files that it includes, without top-level ``???`` values."""
    if not isinstance(block, dict):
        raise ConfigError(f"{_short(file)}: {STAGES}.{name} must be a block, got {shown(block)}")
    block = dict(block)
    stage: dict[str, Any] = {}
    key = f"{STAGES}.{name}.include"
    for included in _includes(block, file, key):
        part = "#" in included
        for layer in [_part(included, file, chain, key)] if part else _included(included, file, chain):
            if STAGES in layer:
                raise ConfigError(
                    f"{_short(file)}: {key} names a pipeline, but a stage is a single run; "
                    f"include one stage of the pipeline, as in {included}#{STAGES}.{next(iter(layer[STAGES]))}"
                )
            stage = merge(stage, {key: value for key, value in layer.items() if value != MISSING_MARK})
    result: dict[str, Any] = merge(stage, _with_parts(block, file, chain, ()))
    return result


def _with_parts(block: Any, file: Path, chain: tuple[Path, ...], path: tuple[str, ...]) -> Any:
    """``block`` with every nested ``include: file.yaml#key.path`` replaced by the named block.

    Interpolations that refer to keys inside the included block are changed to refer to the same keys in the copy.
    """
    if not isinstance(block, dict):
        return block
    own = {key: _with_parts(value, file, chain, (*path, str(key))) for key, value in block.items()}
    if not path or "include" not in own:
        return own
    included = str(own.pop("include"))
    part = _part(included, file, chain, f"{'.'.join(path)}.include")
    return merge(_moved(part, included.partition("#")[2], ".".join(path)), own, path)


def _part(name: str, file: Path, chain: tuple[Path, ...], key: str) -> dict[str, Any]:
    """The block that ``name`` refers to, which has the form ``file.yaml#key.path``.

    Raises:
        ConfigError: The file has no such block.
    """
    there, hash_mark, inner = name.partition("#")
    part: Any = {}
    if hash_mark and there:
        for layer in _included(there, file, chain):
            part = merge(part, layer)
    for step in inner.split("."):
        part = part.get(step) if isinstance(part, dict) else None
    if not isinstance(part, dict):
        raise ConfigError(f"{_short(file)}: {key} must name an existing block as file.yaml#key.path, got {name}")
    return part


def _moved(value: Any, old: str, new: str) -> Any:
    """``value`` with interpolations ``${old.key}`` changed to ``${new.key}``."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    return value.replace("${" + old + ".", "${" + new + ".") if isinstance(value, str) else value


def _find_include(name: str, including: Path, chain: tuple[Path, ...]) -> Path:
    for place in (including.parent, Path.cwd() / "configs", shipped_root() / "configs"):
        if is_file(place / name):
            return place / name
    renamed = renamed_config(name)
    if renamed is not None:
        report_alias(f"included file {name}", str(renamed))
        return _find_include(str(renamed), including, chain)
    trail = " -> ".join([*(_short(link) for link in (*chain, including)), name])
    raise ConfigError(
        f"{_short(including)}: included file {name} does not exist in the folder of the including file or in configs/ "
        f"({trail}).{_similar_files(Path(name))}"
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        check_file_size(file, MAX_CONFIG_BYTES, "a configuration")
        content = parse_yaml(read_text(file))
    except YamlProblem as problem:
        line = f", line {problem.line}" if problem.line is not None else ""
        raise ConfigError(f"{_short(file)}{line}: {problem}") from None
    except ValueError as error:
        raise ConfigError(str(error).replace(str(file), _short(file))) from None
    except OSError as error:
        raise ConfigError(os_reason(error)) from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{_short(file)}: must be a mapping (`key: value` lines), got {shown(content)}")
    return content


def layers_of_text(text: str) -> dict[str, Any]:
    """The layers in the text of a config file that this program has written, without includes.

    Raises:
        ConfigError: The text is not a mapping in YAML.
    """
    try:
        layers = parse_yaml(text)
    except YamlProblem as problem:
        raise ConfigError(str(problem)) from None
    if not isinstance(layers, dict):
        raise ConfigError(f"must be a mapping (`key: value` lines), got {shown(layers)}")
    return layers


def _expand_shorthands(layer: Any, path: tuple[str, ...]) -> Any:
    path = path[2:] if path[:1] == (STAGES,) else path  # the block of a stage is a complete config
    if isinstance(layer, str) and path in NAMED_MODELS and layer != MISSING_MARK and "${" not in layer:
        kind, model = NAMED_MODELS[path]
        return {"type": layer} if layer in registry.names(path[-1]) else {"type": kind, model: layer}
    key = SHORTHANDS.get(path)
    if key is None or not isinstance(layer, dict):
        return layer
    return {name: {key: value} if is_bare(value) else value for name, value in layer.items()}


def _merge_list(base: list[Any], layer: dict[str, Any], path: tuple[str, ...]) -> list[Any]:
    result = copy.deepcopy(base)
    for key, value in layer.items():
        index = int(key)
        if index >= len(result):
            raise ConfigError(
                f"{'.'.join(path)}: there is no item {index}; the list has {len(result)} items, counted from 0"
            )
        result[index] = merge(result[index], value, (*path, str(key)))
    return result


def _is_index(key: Any) -> bool:
    return str(key).isdecimal() and len(str(key)) < 10


def _short(path: Path) -> str:
    """``path`` relative to the working directory if it is inside that directory, otherwise unchanged."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _similar_files(file: Path) -> str:
    roots = {root.resolve() for root in (Path.cwd() / "configs", shipped_root() / "configs") if root.is_dir()}
    known = sorted({str(path.relative_to(root)) for root in roots for path in root.rglob("*.yaml")})
    wanted = str(file)[:200].removesuffix(".yaml").removeprefix("./").removeprefix("configs/")
    same_name = [name for name in known if Path(name).name == file.name]
    if same_name:
        return f" Did you mean {' or '.join(repr(name) for name in same_name[:3])} in configs/?"
    return near_matches(wanted, [name.removesuffix(".yaml") for name in known])
