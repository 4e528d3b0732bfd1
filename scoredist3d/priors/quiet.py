"""Silence of the model libraries during a call."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress log messages, warnings and progress bars of diffusers, transformers and huggingface_hub.

    Loaders use it because they check what these libraries only warn about, and report it in their own words; a progress
    bar would break the run's own output. Exceptions are still raised, and all settings are restored at the end.
    """
    diffusers, transformers, hub = (
        importlib.import_module(f"{library}.utils.logging")
        for library in ("diffusers", "transformers", "huggingface_hub")
    )
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (diffusers, transformers, hub):
            # Not ERROR: diffusers reports the search for other weight files as an error, and then loads these.
            stack.callback(module.set_verbosity, module.get_verbosity())
            module.set_verbosity(logging.CRITICAL)
        # In this order, because transformers switches the bars of the hub together with its own.
        bars = importlib.import_module("huggingface_hub.utils")
        _switch_off(stack, not bars.are_progress_bars_disabled(), bars.enable_progress_bars, bars.disable_progress_bars)
        for module in (diffusers, transformers):
            _switch_off(
                stack, module.is_progress_bar_enabled(), module.enable_progress_bar, module.disable_progress_bar
            )
        yield


def _switch_off(stack: ExitStack, enabled: bool, enable: Any, disable: Any) -> None:
    """Disable now and return to the earlier state with the stack."""
    disable()
    stack.callback(enable if enabled else disable)
