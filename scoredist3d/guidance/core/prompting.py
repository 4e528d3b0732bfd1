"""Helpers for methods that compare the prompt with other texts."""

from __future__ import annotations

import logging

from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions, Conditioning

_log = logging.getLogger(__name__)


def warn_of_unknown_words(prior: Prior, key: str, text: str, advice: str) -> None:
    """Log a warning about words of ``guidance.<key>`` on which the prior was not trained, followed by ``advice``."""
    unknown = prior.unknown_words(text)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        _log.warning(
            f"guidance.{key}: the prior was not trained on {words}, so the text may have little effect; {advice}."
        )


def empty_of(conditions: CFGConditions) -> Conditioning:
    """Conditioning of the empty prompt, or the unconditional one if the conditions contain no empty prompt."""
    return conditions.unconditional if conditions.empty is None else conditions.empty
