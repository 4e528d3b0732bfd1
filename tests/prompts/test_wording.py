"""Prompts without a known noun are refused or warned about; other unknown words get one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from scoredist3d import registry
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import validate
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.priors.vocabulary import Nouns
from scoredist3d.prompts import ExtraPrompt, PromptProcessor
from scoredist3d.prompts.wording import check_prompts

KINDS = "mug, wine glass, thing"


class PriorWithNouns(GaussianMixturePrior):
    """The analytic prior with a vocabulary and nouns."""

    nouns = Nouns({"mug": ("cup",), "wine glass": ()}, ("thing",))

    def __init__(self) -> None:
        super().__init__(GaussianMixturePrior.Config(image_size=8))
        self.vocabulary = frozenset({"a", "red", "three", "mug", "cup", "wine", "glass", "thing"})


def processor(prior: GaussianMixturePrior, prompt: str, negative: str = "", **options: Any) -> PromptProcessor:
    config = PromptProcessor.Config(view_dependent="never")
    return PromptProcessor(config, prior=prior, prompt=prompt, negative_prompt=negative, **options)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("prompt", "near"),
    [("a giraffe", ""), ("a glass", "; the nearest is 'wine glass'"), ("a red cupp", "; the nearest is 'mug'")],
)
def test_a_prompt_without_a_known_noun_is_refused(prompt: str, near: str) -> None:
    with pytest.raises(ValueError) as caught:
        processor(PriorWithNouns(), prompt)
    assert str(caught.value) == (
        f"prompt: {prompt!r} names no known kind of object{near}. Use one of {KINDS}, or add --anyway (in a config, "
        "prior.allow_unknown_nouns: true) to run all the same"
    )


def test_allowed_unknown_nouns_get_one_line(caplog: pytest.LogCaptureFixture) -> None:
    prior = PriorWithNouns()
    prior.allow_unknown_nouns = True
    processor(prior, "an enchanted giraffe")
    assert messages(caplog) == [
        "prompt: 'an enchanted giraffe' names no kind of object that the prior was trained on, so the result will look "
        "like one of its own kinds"
    ]


def test_other_unknown_words_get_one_line_for_all_processors_of_a_prior(caplog: pytest.LogCaptureFixture) -> None:
    prior = PriorWithNouns()
    for _ in range(3):
        processor(prior, "red mugs on an enchanted giraffe")
    assert messages(caplog) == [
        "prompt: the prior was not trained on 'mugs' (near: 'mug'), 'on', 'an', 'enchanted', 'giraffe', and may ignore "
        "them"
    ]


def test_only_the_prompt_needs_a_noun(caplog: pytest.LogCaptureFixture) -> None:
    prior = PriorWithNouns()
    with caplog.at_level(logging.WARNING):
        processor(prior, "")
        processor(prior, "3 + 4")
        assert messages(caplog) == []
        processor(prior, "a red mug", "ugly", extra={"source": ExtraPrompt("oversaturated, smooth")})
    assert messages(caplog) == ["negative_prompt: the prior was not trained on 'ugly', and may ignore it"]


def test_a_prior_without_stated_nouns_takes_any_prompt(caplog: pytest.LogCaptureFixture) -> None:
    processor(GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8)), "giraffe")
    assert messages(caplog) == ["prompt: the prior was not trained on 'giraffe', and may ignore it"]


def test_configs_are_checked_without_loading_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a prior was built")

    monkeypatch.setattr(registry.lookup("prior", "diffusers").cls, "__init__", refuse)
    known, unknown = validate({"prompt": "a mug"}), validate({"prompt": "a quark"})
    check_prompts([known])
    with pytest.raises(ConfigError) as caught:
        check_prompts([unknown, known, unknown])
    assert str(caught.value).startswith("prompt: 'a quark' names no known kind of object. Use one of mug, bottle, ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prior",
    [
        {"allow_unknown_nouns": True},
        {"pretrained_model_name_or_path": "owner/model"},
        {"type": "gaussian-mixture"},
    ],
)
def test_configs_with_other_priors_take_any_prompt(prior: dict[str, Any]) -> None:
    check_prompts([validate({"prompt": "a quark", "prior": prior})])


def test_a_list_of_words_states_no_nouns(tmp_path: Path) -> None:
    (tmp_path / "vocabulary.json").write_text('["a", "mug"]')
    check_prompts([validate({"prompt": "a quark", "prior": {"pretrained_model_name_or_path": str(tmp_path)}})])


def test_a_prompt_without_a_real_world_height_is_refused_before_the_run() -> None:
    def config(prompt: str) -> ExperimentConfig:
        return validate({"prompt": prompt, "prior": {"type": "gaussian-mixture"}, "exporter": {"height": "real-world"}})

    check_prompts([config("a mug")])
    with pytest.raises(ConfigError, match=r"^exporter\.height: no height is known for 'a quark'; set the height"):
        check_prompts([config("a quark"), config("a mug"), config("a quark")])
