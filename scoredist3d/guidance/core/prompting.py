"""Helpers of methods that compare the prompt with other texts."""

from __future__ import annotations

import logging

from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions, Conditioning

_log = logging.getLogger(__name__)


def warn_of_unknown_words(prior: Prior, key: str, text: str, advice: str) -> None:
    """Log a warning about words of ``guidance.<key>`` that the prior does not know; ``advice`` says what to do."""
    unknown = prior.unknown_words(text)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        _log.warning(
            f"guidance.{key}: the prior was not trained on {words}, so the text may have little effect; {advice}."
        )


def empty_of(conditions: CFGConditions) -> Conditioning:
    """Conditioning of the empty prompt; the unconditional one where the conditions have no empty prompt."""
    return conditions.unconditional if conditions.empty is None else conditions.empty
