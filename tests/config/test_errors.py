from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from shared import tiny_runs

import scoredist3d
from scoredist3d.config import ConfigError, FieldError, under
from scoredist3d.config.errors import join_path
from scoredist3d.config.validation import validate
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.training.distributed import Devices
from scoredist3d.training.fit import RankContext, build_system


def test_every_holder_of_a_block_adds_its_path() -> None:
    with pytest.raises(FieldError) as caught, under("system"), under("guidance"):
        raise FieldError("0.6 is above t_max 0.4", "t_min")
    assert str(caught.value) == "system.guidance.t_min: 0.6 is above t_max 0.4"
    assert (caught.value.path, caught.value.problem) == ("system.guidance.t_min", "0.6 is above t_max 0.4")
    assert caught.value.__cause__ is None and caught.value.__traceback__ is not None


def test_the_class_and_the_cause_of_an_error_stay() -> None:
    with pytest.raises(ConfigError, match=r"^a: empty$") as caught, under("a"):
        raise ConfigError("empty") from KeyError("b")
    assert isinstance(caught.value.__cause__, KeyError)


def test_other_errors_are_left_alone_or_claimed() -> None:
    with pytest.raises(ValueError, match=r"^bad$") as caught, under("a"):
        raise ValueError("bad")
    assert not isinstance(caught.value, FieldError)
    with pytest.raises(FieldError, match=r"^b\.a: bad$"), under("b"), under("a", claim=True):
        raise ValueError("bad")
    with pytest.raises(TypeError), under("a", claim=True):
        raise TypeError("bad")


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("bad", "a.b")))
    assert (str(error), error.path, error.problem) == ("a.b: bad", "a.b", "bad")


@pytest.mark.parametrize(("path", "key", "joined"), [("a", "b", "a.b"), ("", "b", "b"), ("a", "", "a"), ("", "", "")])
def test_paths_are_joined_where_both_are_given(path: str, key: str, joined: str) -> None:
    assert join_path(path, key) == joined


def test_what_only_building_shows_is_said_under_the_whole_key(tmp_path: Path) -> None:
    place = RankContext(Devices.parse("cpu"))
    plain = tiny_runs.plain(tmp_path)
    plain["system"]["background"] = {"type": "textured", "image": "nowhere.png"}
    config = validate(plain)
    with pytest.raises(FieldError, match=r"^system\.background\.image: there is no file nowhere\.png"):
        build_system(config, place)
    alone = config.system
    prior = scoredist3d.build(GaussianMixturePrior.Config(image_size=8))
    with pytest.raises(FieldError, match=r"^background\.image: there is no file nowhere\.png"):
        scoredist3d.build(alone, prior=prior, prompt="a mug")
