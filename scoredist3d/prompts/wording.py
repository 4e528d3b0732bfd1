"""Comparison of prompts with the words and kinds of objects that a prior knows."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from scoredist3d import registry
from scoredist3d.config.errors import ConfigError, FieldError, under
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.export.base import Exporter
from scoredist3d.priors.base import Prior
from scoredist3d.priors.vocabulary import Vocabulary, near_word, words_of

_log = logging.getLogger(__name__)


def check_prompts(configs: Iterable[ExperimentConfig]) -> None:
    """Check that the prompts of new runs name a kind of object that prior and exporter know; no model is loaded.

    Only ``prompt`` is checked, not the negative prompt and the additional prompts of methods.

    Raises:
        ConfigError: A prompt names no known kind, and ``prior.allow_unknown_nouns`` is not set; or an option of the
            exporter does not fit the prompt.
    """
    problems: dict[str, None] = {}  # in order, and without repetition: the stages of a pipeline have one prompt
    for config in configs:
        prior = registry.entry_of(config.prior).cls
        if issubclass(prior, Prior) and not getattr(config.prior, "allow_unknown_nouns", False):
            vocabulary = prior.stated_vocabulary(config.prior)
            problem = None if vocabulary is None else unknown_noun(vocabulary, config.prompt)
            problems |= {} if problem is None else {problem: None}
        exporter = registry.build(config.exporter)
        try:
            with under("exporter"):
                if isinstance(exporter, Exporter):
                    exporter.for_prompt(config.prompt)
        except FieldError as error:
            problems |= {str(error): None}
    if problems:
        raise ConfigError("\n".join(problems))


def unknown_noun(vocabulary: Vocabulary, prompt: str) -> str | None:
    """An error message for a prompt that names no known kind of object; None if it names one or has no words."""
    nouns = vocabulary.nouns
    if nouns is None or not words_of(prompt) or nouns.known_in(prompt):
        return None
    nearest = nouns.nearest(prompt, correct=vocabulary.words)
    near = "" if nearest is None else f"; the nearest is {nearest!r}"
    known = ", ".join([*nouns.kinds, *nouns.generic])
    return (
        f"prompt: {prompt!r} names no known kind of object{near}. Use one of {known}, "
        "or add --anyway (in a config, prior.allow_unknown_nouns: true) to run all the same"
    )


def refuse_or_warn(prior: Prior, prompt: str, negative_prompt: str) -> None:
    """Check the texts of a prompt processor, with at most one warning for each of the two.

    A prior gives the same warning only once, although every method of a comparison has a prompt processor.

    Raises:
        ValueError: The prompt names no known kind of object, and the prior does not allow this.
    """
    problem = unknown_noun(Vocabulary(prior.vocabulary or frozenset(), prior.nouns), prompt)
    if problem is not None and not prior.allow_unknown_nouns:
        raise ValueError(problem)
    for key, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        message = unknown_words_message(prior, text, key)
        if key == "prompt" and problem is not None:
            message = (
                f"prompt: {prompt!r} names no kind of object that the prior was trained on, so the result will look "
                "like one of its own kinds"
            )
        if message is not None and message not in prior.given_warnings:
            prior.given_warnings.add(message)
            _log.warning(message)


def unknown_words_message(prior: Prior, text: str, key: str) -> str | None:
    """A warning that names words of a text on which the prior was not trained; None if there are none.

    Args:
        prior: The prior with its vocabulary.
        text: A prompt.
        key: Configuration key of the prompt.
    """
    unknown = prior.unknown_words(text)
    if not unknown or prior.vocabulary is None:
        return None
    known = sorted(prior.vocabulary)
    near = {word: near_word(word, known) for word in unknown}
    words = ", ".join(repr(word) + (f" (near: {other!r})" if other else "") for word, other in near.items())
    return f"{key}: the prior was not trained on {words}, and may ignore {'it' if len(unknown) == 1 else 'them'}"
