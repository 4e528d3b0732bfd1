"""Interpolations ``${...}``, which OmegaConf resolves, with a limit of their size and one sentence for each mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationToMissingValueError

from scoredist3d.config.coercion import MISSING_MARK, shown
from scoredist3d.config.errors import ConfigError
from scoredist3d.limits import MAX_INTERPOLATED, MAX_INTERPOLATION_CHAIN, MAX_INTERPOLATION_TEXT

_COST = 50
"""Part of the budget that each interpolation uses, besides the size of its value."""
_RAISED = re.compile(r"^\w+ (raised )?while resolving interpolation: ")
_LIMITED = ("_resolve_node_interpolation", "_evaluate_custom_resolver")
"""Methods of OmegaConf's containers to which every interpolation leads: ``${key}`` and ``${resolver:arguments}``."""


def escape_interpolations(text: str) -> str:
    """``text`` escaped so that :func:`resolve` returns the original text even if it contains ``${``."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def resolve(merged: dict[str, Any]) -> dict[str, Any]:
    """``merged`` with every interpolation replaced by the value that it refers to.

    Raises:
        ConfigError: An interpolation is malformed, refers to itself or to a key that does not exist, or the values of
            all interpolations together are too large.
    """
    problems: list[str] = []
    _check_syntax(merged, (), problems)
    if not problems:
        config, budget = OmegaConf.create(merged), _Budget()
        budget.limit(config)
        resolved: dict[str, Any] = _resolved(config, merged, (), problems, budget)
    if problems:
        raise ConfigError("\n".join(problems))
    return resolved


class _Budget:
    """Counts interpolations and the sizes of their values, so that a few lines cannot expand to gigabytes."""

    def __init__(self) -> None:
        self.left = MAX_INTERPOLATED
        self.depth = 0
        self.problem: str | None = None  # Reason why nothing more is resolved.

    def limit(self, node: Any) -> None:
        """Let all containers of a configuration count the interpolations that they resolve."""
        if not OmegaConf.is_config(node):
            return
        for name in _LIMITED:
            node.__dict__[name] = self._counted(getattr(node, name))
        for child in _children(node):
            self.limit(child)

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.spend(_COST)
            if self.depth >= MAX_INTERPOLATION_CHAIN:
                self._stop(f"more than {MAX_INTERPOLATION_CHAIN} interpolations refer to each other; write a value")
            self.depth += 1
            try:
                value = method(*arguments, **options)
            finally:
                self.depth -= 1
            self._spend_for(value)
            return value

        return counted

    def _spend_for(self, value: Any) -> None:
        """Count the characters and values in ``value``; stops as soon as they are too many."""
        if OmegaConf.is_config(value):
            self.spend(1)
            for child in _children(value):
                self._spend_for(child)
        else:
            content = getattr(value, "_value", lambda: value)()
            self.spend(len(content) if isinstance(content, str) else 1)

    def spend(self, size: int) -> None:
        """Subtract the size of a value."""
        self.left -= size
        if self.left < 0:
            self._stop(f"interpolations produce more than {MAX_INTERPOLATED} characters; remove some")

    def _stop(self, problem: str) -> NoReturn:
        self.problem = self.problem or problem
        raise ValueError(problem)


def _children(node: Any) -> list[Any]:
    """The nodes directly inside of a container, with interpolations unresolved."""
    content = node._content
    return list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []


def _check_syntax(value: Any, path: tuple[Any, ...], problems: list[str]) -> None:
    """Add a line to ``problems`` for each text with an interpolation that OmegaConf cannot parse."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check_syntax(item, (*path, key), problems)
    elif isinstance(value, str) and "${" in value:
        if len(value) > MAX_INTERPOLATION_TEXT and re.search(r"(?<!\\)\$\{", value):
            limit = f"a text with interpolations may have at most {MAX_INTERPOLATION_TEXT:,} characters; shorten it"
            problems.append(_line(path, value, limit))
            return
        try:
            OmegaConf.create({"text": value})
        except Exception as error:  # The parser fails in various ways.
            problems.append(_line(path, value, _problem(error)))


def _resolved(config: Any, value: Any, path: tuple[Any, ...], problems: list[str], budget: _Budget) -> Any:
    """``value``, the content of ``config`` at ``path``, with interpolations resolved; adds errors to ``problems``."""
    if isinstance(value, dict):
        return {key: _resolved(config, item, (*path, key), problems, budget) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(config, item, (*path, index), problems, budget) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value or budget.problem:
        return value
    try:
        node = config
        for key in path:
            node = node[key]
        return _plain(node, budget)
    except InterpolationToMissingValueError:
        # The interpolation refers to a missing value, so this value is missing too; the validator reports both.
        return MISSING_MARK
    except Exception as error:  # Resolvers raise errors of any type.
        problems.append(_line(path, value, budget.problem or _problem(error)))
        return value


def _plain(value: Any, budget: _Budget) -> Any:
    """A copy of a value with its interpolations resolved; unlike ``OmegaConf.to_container``, it stops at the limit."""
    if not OmegaConf.is_config(value):
        return value
    budget.spend(1)
    keys = list(value) if OmegaConf.is_dict(value) else range(len(value))
    items = {key: MISSING_MARK if OmegaConf.is_missing(value, key) else _plain(value[key], budget) for key in keys}
    return items if OmegaConf.is_dict(value) else list(items.values())


def _line(path: tuple[Any, ...], value: str, problem: str) -> str:
    return f"{'.'.join(map(str, path))}: cannot resolve {shown(value)}: {problem}"


def _problem(error: Exception) -> str:
    """The reason of an error of OmegaConf or of a resolver, without names of its internals."""
    if isinstance(error, RecursionError) or "RecursionError" in str(error):
        return "it refers to itself, or too many interpolations refer to each other; write a value"
    text = _RAISED.sub("", (str(error).strip().splitlines() or [""])[0])
    if text[:1] == text[-1:] and text[:1] in ("'", '"'):  # KeyError quotes its message.
        text = text[1:-1]
    if isinstance(error, GrammarParseError):
        return f"not a valid interpolation ({text}); write \\${{ for the text ${{"
    return text or "it has no value; write a value"
