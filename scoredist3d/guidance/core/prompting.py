"""What methods share that compare the prompt with other texts."""

from __future__ import annotations

import logging

from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions, Conditioning

_log = logging.getLogger(__name__)


def warn_of_unknown_words(prior: Prior, key: str, text: str, advice: str) -> None:
    """Log one sentence about words of ``guidance.<key>`` that the prior has never seen, with what to do about it."""
    unknown = prior.unknown_words(text)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        _log.warning(f"guidance.{key}: the prior has never seen {words}, so the text may mean little to it; {advice}.")


def empty_of(conditions: CFGConditions) -> Conditioning:
    """The empty prompt; the unconditional branch stands for it where the caller gives no other."""
    return conditions.unconditional if conditions.empty is None else conditions.empty
