"""What methods share that compare the prompt with other texts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from scoredist3d.noise import per_item
from scoredist3d.priors.base import Branches, Conditioning, Prior, perpendicular

_log = logging.getLogger(__name__)


def warn_of_unknown_words(prior: Prior, key: str, text: str, advice: str) -> None:
    """Log one sentence about words of ``guidance.<key>`` that the prior has never seen, with what to do about it."""
    unknown = prior.unknown_words(text)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        _log.warning(f"guidance.{key}: the prior has never seen {words}, so the text may mean little to it; {advice}.")


def empty_of(branches: Branches) -> Conditioning:
    """The empty prompt; the unconditional branch stands for it where the caller gives no other."""
    return branches.unconditional if branches.empty is None else branches.empty


def perp_neg_term(direction: Tensor, others: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """sum_i w_i perp(d_i, d) of Perp-Neg (arXiv 2304.04968), which joins the direction d.

    Args:
        direction: (B, C, h, w), the prompt's prediction less that without a prompt.
        others: The same of every prompt to stay away from; at least one.
        weights: (B,) each, negative numbers.
    """
    terms = [per_item(w, other) * perpendicular(other, direction) for other, w in zip(others, weights, strict=True)]
    return sum(terms[1:], start=terms[0])
