"""Prompt debiasing: the rule on given probabilities, and a tiny masked language model end to end."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.prompts import PromptProcessor
from scoredist3d.prompts.debias import VIEW_WORDS, MaskedLanguageModel, debiased_prompts

WORDS = ["front", "side", "back", "overhead", "this", "image", "is", "depicting", "a", "view", "of", "smiling", "dog"]


class Scripted:
    """Probabilities of (front, side, back, overhead) by text; uniform where none are given."""

    def __init__(self, **by_text: list[float]) -> None:
        self.table = {text.replace("_", " "): values for text, values in by_text.items()}
        self.asked: list[str] = []

    def __call__(self, prompts):
        self.asked += prompts
        return torch.tensor([self.table.get(prompt, [0.25] * 4) for prompt in prompts], dtype=torch.float64)


def smiling() -> Scripted:
    """Without "smiling" the back is three times as likely; without "dog" nothing changes."""
    whole = [0.8, 0.1, 0.05, 0.05]
    return Scripted(a_smiling_dog=whole, a_dog=[0.65, 0.1, 0.15, 0.1], a_smiling=whole, smiling_dog=whole)


def test_words_that_make_a_view_less_likely_are_removed():
    model = smiling()
    texts = debiased_prompts("a smiling dog", model)
    # back: 0.05 / (0.5 * 0.15 + 0.5 * 0.05) = 0.5; overhead: 0.05 / 0.075 = 0.67; front: 0.8 / 0.725 = 1.1; side: 1.
    assert texts == {
        "front": "a smiling dog",
        "side": "a smiling dog",
        "back": "a dog",
        "overhead": "a dog",
    }
    assert model.asked == ["a smiling dog", "smiling dog", "a dog", "a smiling"]


@pytest.mark.parametrize(
    ("threshold", "back", "overhead"), [(0.6, "a dog", "a smiling dog"), (0.4, *["a smiling dog"] * 2)]
)
def test_the_threshold_is_on_the_ratio_to_the_mean(threshold, back, overhead):
    texts = debiased_prompts("a smiling dog", smiling(), threshold=threshold)
    assert (texts["back"], texts["overhead"]) == (back, overhead)


def test_the_ratio_at_the_threshold_keeps_the_word():
    # P / (0.5 P_i + 0.5 P) = 0.25 / 0.3125 = 0.8 exactly.
    model = Scripted(two_words=[0.25] * 4, words=[0.375, 0.375, 0.125, 0.125], two=[0.25] * 4)
    assert debiased_prompts("two words", model, threshold=0.8)["front"] == "two words"
    assert debiased_prompts("two words", model, threshold=0.8001)["front"] == "words"


def test_only_the_given_words_are_removed_and_must_exist():
    assert debiased_prompts("a smiling dog", smiling(), removable=["dog"])["back"] == "a smiling dog"
    model = smiling()
    assert debiased_prompts("a smiling dog", model, removable=["smiling"])["back"] == "a dog"
    assert model.asked == ["a smiling dog", "a dog"]
    assert debiased_prompts("a smiling dog", smiling(), removable=[])["back"] == "a smiling dog"
    with pytest.raises(ValueError, match="debias_words: the prompt 'a smiling dog' does not contain 'cat'"):
        debiased_prompts("a smiling dog", smiling(), removable=["dog", "cat"])


def test_a_view_never_loses_its_whole_prompt():
    likely = [0.4, 0.2, 0.2, 0.2]
    texts = debiased_prompts("red dog", Scripted(red_dog=[0.1, 0.3, 0.3, 0.3], red=likely, dog=likely))
    assert texts["front"] == "red dog"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialized masked language model whose vocabulary has the template's words."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=1.0,
        )
        transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_probabilities_are_those_at_the_mask_and_do_not_depend_on_padding(tiny_bert: Path):
    model = MaskedLanguageModel(str(tiny_bert))
    both = model(["a dog", "a smiling dog"])
    assert both.shape == (2, 4)
    torch.testing.assert_close(both.sum(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(both[:1], model(["a dog"]), rtol=1e-5, atol=1e-6)
    ids = model.tokenizer("this image is depicting a [MASK] view of a dog", return_tensors="pt")
    place = ids.input_ids[0].tolist().index(model.tokenizer.mask_token_id)
    assert place == 6
    probability = model.model(**ids).logits[0, place].double().softmax(-1)
    views = probability[[5 + WORDS.index(word) for word in VIEW_WORDS]]
    torch.testing.assert_close(both[0], views / views.sum(), rtol=1e-5, atol=1e-6)
    assert (both.max() - both.min()) > 0.05  # a constant answer would pass the rest


def prior(takes_cameras: bool = False) -> GaussianMixturePrior:
    made = GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8))
    made.takes_cameras = takes_cameras
    return made


def processor(p: GaussianMixturePrior, **options) -> PromptProcessor:
    return PromptProcessor(PromptProcessor.Config(**options), prior=p, prompt="a smiling dog")


def test_the_processor_adds_view_words_to_what_is_left(tiny_bert: Path, caplog: pytest.LogCaptureFixture):
    model = MaskedLanguageModel(str(tiny_bert))
    expected = debiased_prompts("a smiling dog", model, threshold=1.0, removable=["smiling"])
    assert set(expected.values()) == {"a smiling dog", "a dog"}  # probabilities sum to one: some fall, some rise
    options = {"debias_model": str(tiny_bert), "debias_words": ["smiling"]}
    with caplog.at_level(logging.INFO):
        texts = processor(prior(), **options, debias_threshold=1.0).texts
    for view in VIEW_WORDS:
        assert texts[view] == f"{expected[view]}, {view} view"
        assert f"debiased prompt of the {view} view: {expected[view]!r}" in caplog.text
    assert texts["plain"] == "a smiling dog"
    assert processor(prior(), **options, debias_threshold=0.0).texts == processor(prior()).texts


def test_debiasing_without_view_words_is_named(tiny_bert: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        texts = processor(prior(takes_cameras=True), debias_model="no model is loaded").texts
    assert "prompt debiasing is disabled" in caplog.text and texts["back"] == "a smiling dog"
    problems = PromptProcessor.Config(debias_model="x", view_dependent="never").validate()
    assert problems == ["debias_model: requires view words; set view_dependent to always"]


def test_models_that_do_not_fit_are_refused_in_one_sentence(tiny_bert: Path, tmp_path: Path):
    import transformers

    with pytest.raises(
        ValueError, match=r"prompt_processor\.debias_model: no masked language model can be loaded from .*nothing'"
    ) as error:
        processor(prior(), debias_model=str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)
    headless = tmp_path / "headless"
    config = transformers.BertConfig.from_pretrained(tiny_bert)
    with torch.random.fork_rng():
        transformers.BertModel(config).save_pretrained(headless)
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(headless)
    with pytest.raises(ValueError, match="lacks weights of a masked language model"):
        MaskedLanguageModel(str(headless))


def test_a_vocabulary_without_the_view_words_is_refused(tiny_bert: Path, tmp_path: Path):
    import transformers

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "front", "side", "back", "over", "##head"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    transformers.BertForMaskedLM.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no single token for overhead"):
        MaskedLanguageModel(str(tmp_path))


def test_code_in_a_model_folder_never_runs(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Without an explicit refusal, transformers asks on the terminal whether the folder's code may run.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    folder = shutil.copytree(tiny_bert, tmp_path / "foreign")
    auto_map = {"AutoConfig": "foreign.Config", "AutoModelForMaskedLM": "foreign.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    (folder / "foreign.py").write_text("raise SystemExit('foreign code ran')\n")
    with pytest.raises(ValueError, match=r"debias_model: .* contains custom code"):
        MaskedLanguageModel(str(folder))
