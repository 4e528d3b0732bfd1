"""Errors of the hub are one sentence that says what to do; nothing here uses the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, errors

from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.hub import cached_models, hub_problem

NAME = "owner/model"


def raised(kind: type[Exception]) -> Exception:
    """An error of the hub without its response."""
    return kind.__new__(kind, "from the library")


def cache_with(root: Path, *names: str) -> Path:
    for name in names:
        folder = root / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
    (root / "models--other--encoder" / "snapshots" / "0").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, rf"is gated: accept its license at https://huggingface\.co/{NAME} and log in with"),
        (errors.RepositoryNotFoundError, "is not on the hub, or is private: check the id, log in"),
        (errors.RevisionNotFoundError, r"has no such revision: correct prior\.revision"),
        (errors.RemoteEntryNotFoundError, r"use a model with a model_index\.json"),
        (errors.LocalEntryNotFoundError, "is not complete in the cache"),
        (errors.OfflineModeIsEnabled, "is not complete in the cache"),
        (errors.HfHubHTTPError, "the hub cannot be reached"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    with pytest.raises(PriorError, match=message) as caught:
        PipelineSource.open(NAME)
    text = str(caught.value)
    assert text.startswith(f"prior.pretrained_model_name_or_path: '{NAME}' is not an existing folder, and the model")
    assert len(text) < 400 and "\n" not in text


def test_a_missing_part_offline_names_the_models_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers and diffusers wrap the errors of the hub in their own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache_with(tmp_path, "a/one", "b/two-more")))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    source = PipelineSource(NAME, None, None, None, {}, "prior", False)
    with (
        pytest.raises(
            PriorError, match=r"cannot be loaded: the model is not complete in .* has a/one, b/two-more, and"
        ),
        source.using("the unet", "loaded"),
    ):
        try:
            raise raised(errors.LocalEntryNotFoundError)
        except OSError as error:
            raise OSError("a long text about the connection") from error
    assert "HF_HUB_OFFLINE is set" in str(hub_problem(raised(errors.OfflineModeIsEnabled), NAME))


def test_other_errors_keep_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_problem(OSError("disk"), NAME) is None
    source = PipelineSource(NAME, None, None, None, {}, "prior", False)
    with pytest.raises(PriorError, match="cannot be loaded: bad shapes of weights"), source.using("the vae", "loaded"):
        raise RuntimeError("bad shapes of weights")


def test_the_cache_lists_pipelines_only(tmp_path: Path) -> None:
    names = [f"owner/model-{index}" for index in range(7)]
    assert cached_models(cache_with(tmp_path, *names)) == names
    assert cached_models(tmp_path / "none") == []


def test_a_long_list_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [f"owner/model-{index}" for index in range(7)]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache_with(tmp_path, *names)))
    text = str(hub_problem(raised(errors.OfflineModeIsEnabled), NAME))
    assert "owner/model-4, ..., and" in text and "owner/model-5" not in text
