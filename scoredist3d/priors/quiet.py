"""Suppression of log messages, warnings and progress bars of the model libraries."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress log messages, warnings, progress bars and questions of diffusers, transformers and huggingface_hub.

    Loaders raise their own errors for the problems that these libraries only warn about, and a progress bar would
    interrupt the run's output. Exceptions are not suppressed, and all settings are restored at exit.

    Where transformers would ask on the terminal whether to run code from a model, it raises an error instead.
    """
    diffusers, transformers, hub = (
        importlib.import_module(f"{library}.utils.logging")
        for library in ("diffusers", "transformers", "huggingface_hub")
    )
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (diffusers, transformers, hub):
            # Not ERROR: diffusers logs an error for each missing weight format before it loads another one.
            stack.callback(module.set_verbosity, module.get_verbosity())
            module.set_verbosity(logging.CRITICAL)
        # The hub first: transformers switches the hub's progress bars together with its own.
        bars = importlib.import_module("huggingface_hub.utils")
        _switch_off(stack, not bars.are_progress_bars_disabled(), bars.enable_progress_bars, bars.disable_progress_bars)
        for module in (diffusers, transformers):
            _switch_off(
                stack, module.is_progress_bar_enabled(), module.enable_progress_bar, module.disable_progress_bar
            )
        modules: Any = importlib.import_module("transformers.dynamic_module_utils")
        stack.callback(setattr, modules, "TIME_OUT_REMOTE_CODE", modules.TIME_OUT_REMOTE_CODE)
        modules.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer
        yield


def _switch_off(stack: ExitStack, enabled: bool, enable: Any, disable: Any) -> None:
    """Disable a feature and restore its state when ``stack`` is closed."""
    disable()
    stack.callback(enable if enabled else disable)
