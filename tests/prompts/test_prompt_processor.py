"""View words, Perp-Neg values, caching and warnings of the prompt processor."""

import logging
import math

import pytest
import torch

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.priors import Conditioning, guided_prediction
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.prompts import ExtraPrompt, PromptProcessor


class RecordingPrior(GaussianMixturePrior):
    """A prior that embeds each text as a distinct row and records the texts."""

    def __init__(self, takes_cameras: bool = False) -> None:
        super().__init__(GaussianMixturePrior.Config(image_size=8))
        self.asked: list[str] = []
        self.takes_cameras = takes_cameras

    def embed(self, prompts, cameras=None) -> Conditioning:
        self.asked.extend(prompts)
        rows = [torch.full((2, 3), float(sum(map(ord, text)))) for text in prompts]
        return Conditioning(torch.stack(rows), self.camera_condition(cameras, len(rows)))

    def camera_condition(self, cameras, batch):
        if not self.takes_cameras:
            return None
        return torch.zeros(batch, 16) if cameras is None else cameras.c2w.flatten(1)


def views(azimuths: list[float], elevation: float = 10.0) -> Cameras:
    a = torch.tensor(azimuths, dtype=torch.float64)
    rest = (torch.full_like(a, value) for value in (elevation, 2.0, 40.0))
    return orbit(a, *rest, 8, 8)


def processor(prior=None, prompt="a cat", negative="", **options) -> PromptProcessor:
    config = PromptProcessor.Config(**options)
    return PromptProcessor(config, prior=prior or RecordingPrior(), prompt=prompt, negative_prompt=negative)


def value(text: str) -> float:
    return float(sum(map(ord, text)))


def test_is_registered():
    assert registry.lookup("prompt-processor", "view-dependent").cls is PromptProcessor


@pytest.mark.parametrize(
    ("azimuth", "view"),
    [
        (0, "front"),
        (44, "front"),
        (-44, "front"),
        (46, "side"),
        (-90, "side"),
        (134, "side"),
        (136, "back"),
        (180, "back"),
    ],
)
def test_view_words_follow_the_azimuth(azimuth, view):
    conditions = processor()(views([azimuth]))
    assert conditions.positive.text[0, 0, 0] == value(f"a cat, {view} view")


def test_sectors_wrap_and_overhead_wins():
    p = processor(front_threshold=30.0, back_threshold=60.0)
    azimuths = [370.0, -31.0, 121.0, -119.0, 540.0]
    assert p.view_indices(views(azimuths)).tolist() == [0, 1, 2, 1, 2]
    assert p.view_indices(views([0.0, 180.0], elevation=61.0)).tolist() == [3, 3]
    assert p.view_indices(views([0.0], elevation=59.0)).tolist() == [0]


def test_conditions_include_negative_plain_and_empty():
    conditions = processor(negative="ugly")(views([0.0, 90.0]))
    assert conditions.positive.text[:, 0, 0].tolist() == [value("a cat, front view"), value("a cat, side view")]
    assert conditions.unconditional.text[:, 0, 0].tolist() == [value("ugly")] * 2
    assert conditions.plain.text[:, 0, 0].tolist() == [value("a cat")] * 2
    assert conditions.empty.text[:, 0, 0].tolist() == [value("")] * 2
    assert len(conditions.cameras) == 2 and conditions.negatives == ()


def test_every_distinct_text_is_embedded_once():
    prior = RecordingPrior()
    p = processor(prior)
    for _ in range(3):
        p(views([0.0, 90.0]))
    texts = ["a cat, front view", "a cat, side view", "a cat, back view", "a cat, overhead view", "a cat", ""]
    assert prior.asked == texts
    p.embed(["a cat", "a dog", "a dog"])
    assert prior.asked == [*texts, "a dog"]


def test_camera_priors_get_the_camera_in_every_condition_and_no_view_words():
    cameras = views([0.0, 100.0])
    p = processor(RecordingPrior(takes_cameras=True))
    conditions = p(cameras)
    for part in (conditions.positive, conditions.unconditional, conditions.plain, conditions.empty):
        assert torch.equal(part.camera, cameras.c2w.flatten(1))
    assert conditions.positive.text[:, 0, 0].tolist() == [value("a cat")] * 2
    both = processor(RecordingPrior(takes_cameras=True), view_dependent="always")(cameras)
    assert both.positive.text[0, 0, 0] == value("a cat, front view") and both.positive.camera is not None
    assert processor(view_dependent="never")(cameras).positive.text[0, 0, 0] == value("a cat")


def test_without_cameras_the_prompt_itself_is_used():
    conditions = processor()(batch=3)
    assert len(conditions.positive) == 3 and conditions.cameras is None
    assert conditions.positive.text[:, 0, 0].tolist() == [value("a cat")] * 3


@pytest.mark.parametrize(
    ("azimuth", "rows", "front", "side"),
    [
        (0, [1, 0, 0, 0], 0.0, -1.574),
        (45, [0.5, 0.5, 0, 0], -0.689, -0.689),
        (-45, [0.5, 0.5, 0, 0], -0.689, -0.689),
        (90, [0, 1, 0, 0], -1.574, 0.0),
        (180, [0, 0, 1, 0], -1.967, -0.394),
    ],
)
def test_perp_neg_check_values(azimuth, rows, front, side):
    got_rows, got_front, got_side = processor(perp_neg=True).perp_neg_weights(views([azimuth]))
    torch.testing.assert_close(got_rows[0], torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-9)
    assert got_front.item() == pytest.approx(front, abs=1e-3) and got_side.item() == pytest.approx(side, abs=1e-3)


def test_perp_neg_weights_are_zero_overhead():
    rows, front, side = processor(perp_neg=True).perp_neg_weights(views([10.0], elevation=75.0))
    assert rows.tolist() == [[0, 0, 0, 1]] and front.item() == side.item() == 0.0


def test_perp_neg_conditions_interpolate_embeddings_and_guide():
    cameras = views([30.0, 120.0])
    conditions = processor(perp_neg=True)(cameras)
    front, side, back = (value(f"a cat, {view} view") for view in ("front", "side", "back"))
    expected = [front * 2 / 3 + side / 3, side * 2 / 3 + back / 3]
    assert conditions.positive.text[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert [c.text[0, 0, 0].item() for c, _ in conditions.negatives] == [front, side]
    expected_front = [-(4 * math.exp(-0.5 * 2 / 3) - 2.426), -(math.exp(-0.5 * 2 / 3) + 0.967)]
    assert conditions.negatives[0][1].tolist() == pytest.approx(expected_front, rel=1e-5)
    # With a real prior behind it the four conditions run together.
    prior = GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8))
    config = PromptProcessor.Config(perp_neg=True, front_suffix=" left", side_suffix=" right", back_suffix="")
    full = PromptProcessor(config, prior=prior, prompt="red")(cameras)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.5])
    assert torch.isfinite(guided_prediction(prior, x, t, full, 7.5).eps).all()


def test_unknown_words_are_warned_about_in_plain_words(caplog):
    prior = GaussianMixturePrior(GaussianMixturePrior.Config(image_size=8))
    with caplog.at_level(logging.WARNING):
        processor(prior, prompt="red blob")
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        processor(prior, prompt="a red teapot", negative="green", view_dependent="never")
    (record,) = caplog.records
    assert record.getMessage() == "prompt: the prior was not trained on 'a', 'teapot', and may ignore them"


def test_options_that_cannot_act_are_named(caplog):
    assert PromptProcessor.Config().validate() == []
    assert "front_threshold" in PromptProcessor.Config(front_threshold=100, back_threshold=90).validate()[0]
    assert "perp_neg" in PromptProcessor.Config(perp_neg=True, view_dependent="never").validate()[0]
    with caplog.at_level(logging.WARNING):
        conditions = processor(RecordingPrior(takes_cameras=True), perp_neg=True)(views([0.0]))
    assert "Perp-Neg is disabled" in caplog.text and conditions.negatives == ()


@pytest.mark.parametrize("perp_neg", [False, True])
def test_extra_prompts_get_the_same_view_words_unless_disabled(perp_neg: bool):
    extra = {"source": ExtraPrompt("a dog"), "bad": ExtraPrompt("blurry", view_words=False)}
    p = PromptProcessor(PromptProcessor.Config(perp_neg=perp_neg), prior=RecordingPrior(), prompt="a cat", extra=extra)
    conditions = p(views([0, 90, 180]))
    assert set(conditions.extra) == {"source", "bad"}
    expected = [value(f"a dog, {view} view") for view in ("front", "side", "back")]
    assert conditions.extra["source"].text[:, 0, 0].tolist() == expected
    assert conditions.extra["bad"].text[:, 0, 0].tolist() == [value("blurry")] * 3
    assert conditions.empty is not None and conditions.empty.text[0, 0, 0] == 0
    plain = p(batch=2).extra
    assert plain["source"].text[:, 0, 0].tolist() == [value("a dog")] * 2
    assert plain["bad"].text[:, 0, 0].tolist() == [value("blurry")] * 2


def test_extra_prompts_see_the_camera():
    cameras = views([30.0, 60.0])
    p = PromptProcessor(
        PromptProcessor.Config(), prior=RecordingPrior(True), prompt="a cat", extra={"source": ExtraPrompt("a dog")}
    )
    conditioning = p(cameras).extra["source"]
    assert conditioning.text[:, 0, 0].tolist() == [value("a dog")] * 2
    assert torch.equal(conditioning.camera, cameras.c2w.flatten(1))


@pytest.mark.parametrize("name", ["front", "plain", "negative", "empty"])
def test_extra_prompts_may_not_take_the_names_of_others(name: str):
    with pytest.raises(ValueError, match=f"the name '{name}' of an extra prompt is reserved"):
        PromptProcessor(
            PromptProcessor.Config(), prior=RecordingPrior(), prompt="a cat", extra={name: ExtraPrompt("a dog")}
        )
