"""Loading prints nothing, and problems that the libraries only warn about are errors."""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers.utils.logging as diffusers_logging
import huggingface_hub.utils as hub
import pytest
import torch
import transformers.utils.logging as transformers_logging
from safetensors.torch import load_file, save_file

from scoredist3d.priors.diffusers_loading import PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.quiet import quiet_libraries

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Messages that the model libraries log."""
    handler = Collector()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.messages
    for logger in loggers:
        logger.removeHandler(handler)


def load(folder: Path, **options) -> DiffusersPrior:
    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(folder), **options))


def with_key(file: str) -> Callable[[Path], None]:
    """A change that adds an unknown weight."""

    def change(folder: Path) -> None:
        save_file({**load_file(folder / file), "unknown": torch.zeros(2)}, folder / file, metadata={"format": "pt"})

    return change


def with_option(part: str) -> Callable[[Path], None]:
    """A change that adds an unknown option."""

    def change(folder: Path) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "unknown": 1}))

    return change


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / UNET), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


@pytest.mark.parametrize("change", [with_key(UNET), with_key(TEXT), with_option("unet"), with_option("vae"), as_pickle])
def test_loading_and_long_prompts_are_silent(folders, tmp_path, messages, capfd, change):
    folder = shutil.copytree(folders(), tmp_path / "changed")
    change(folder)
    capfd.readouterr()  # of writing the folder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, allow_pickle=change is as_pickle).embed(["a red mug " * 20])
    assert messages == []
    assert capfd.readouterr() == ("", "")


def test_missing_and_misshapen_weights_are_reported_once(folders, tmp_path, messages):
    folder = shutil.copytree(folders(), tmp_path / "changed")
    weights = load_file(folder / TEXT)
    key = sorted(weights)[0]
    save_file({**weights, key: torch.zeros(3, 3)}, folder / TEXT, metadata={"format": "pt"})
    with pytest.raises(
        PriorError, match=r"1 weights of the text_encoder of .* the first is \S+, \(3, 3\) where \(8, 16\)"
    ):
        load(folder)
    del weights[key]
    save_file(weights, folder / TEXT, metadata={"format": "pt"})
    with pytest.raises(PriorError, match=r"the text_encoder of .* lacks 1 weights"):
        load(folder)
    assert messages == []


def test_settings_of_the_libraries_are_restored(messages):
    def settings() -> list[object]:
        bars = [module.is_progress_bar_enabled() for module in (diffusers_logging, transformers_logging)]
        levels = [module.get_verbosity() for module in (diffusers_logging, transformers_logging, hub.logging)]
        return [*bars, hub.are_progress_bars_disabled(), *levels, list(warnings.filters)]

    before = settings()
    with pytest.raises(ValueError, match="inside"), quiet_libraries():
        assert settings() != before
        raise ValueError("inside")
    assert settings() == before
    diffusers_logging.get_logger("diffusers.test").warning("heard again")
    assert messages == ["heard again"]
