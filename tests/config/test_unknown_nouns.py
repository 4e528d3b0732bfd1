"""A prompt without a known noun at launch: runs, dry runs, pipelines and Python; and the option --anyway."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from scoredist3d import cli
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.loader import parse_overrides
from scoredist3d.config.pipeline import load_pipeline
from scoredist3d.config.validation import validate
from scoredist3d.training.pipeline import run_pipeline
from scoredist3d.training.run import run_training

REFUSED = "error: prompt: 'a quark' names no known kind of object. Use one of mug, bottle, wine glass, "
PROMPT = "prompt=a quark"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("config", ["fast.yaml", "text-to-2d/compare.yaml", "quickstart.yaml"])
@pytest.mark.parametrize("dry", [True, False])
def test_it_is_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str], config: str, dry: bool
) -> None:
    arguments = ["--config", f"configs/{config}", "--train", "--gpu", "cpu", PROMPT, *["--dry-run"] * dry]
    assert cli.main(arguments) == cli.USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith(REFUSED) and captured.err.count("\n") == 1
    assert captured.out == "" and list(here.iterdir()) == []


def test_anyway_sets_the_field_of_the_prior(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "configs/fast.yaml", "--train", "--dry-run", PROMPT]
    assert cli.main([*arguments, "--anyway"]) == cli.OK
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["prior"]["allow_unknown_nouns"] is True
    assert cli.main([*arguments, "prior.allow_unknown_nouns=true"]) == cli.OK
    assert capsys.readouterr().out == printed


def test_anyway_applies_to_all_stages_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "configs/quickstart.yaml", "--train", "--dry-run", PROMPT, "--anyway"]
    assert cli.main(arguments) == cli.OK
    stages = list(yaml.safe_load_all(capsys.readouterr().out))
    assert len(stages) == 2 and all(stage["prior"]["allow_unknown_nouns"] for stage in stages)


def test_runs_started_in_python_are_refused_too(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"^prompt: 'a quark' names no known kind"):
        run_training(validate(parse_overrides([PROMPT])), devices="cpu")
    with pytest.raises(ConfigError, match=r"^prompt: 'a quark' names no known kind"):
        run_pipeline(load_pipeline(["configs/quickstart.yaml"], [PROMPT]), devices="cpu")
    assert list(here.iterdir()) == []


def test_an_unknown_noun_trains_with_one_warning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "configs/text-to-2d/compare.yaml", "--train", "--gpu", "cpu", "--anyway", PROMPT]
    methods = ["system.only=[sds, csd]", "trainer.max_steps=1", "test.frames=1", "test.format=gif"]
    assert cli.main([*arguments, *methods, "log.tensorboard=false"]) == cli.OK
    output = "".join(capsys.readouterr())
    assert output.count("names no kind of object that the prior was trained on") == 1
    assert "was not trained on '" not in output
    # An existing run keeps its prompt, also one of a version that took any prompt.
    (resolved,) = here.glob("outputs/*/*/configs/resolved.yaml")
    for file in resolved.parent.glob("*.yaml"):
        file.write_text(file.read_text().replace("allow_unknown_nouns: true", "allow_unknown_nouns: false"))
    assert cli.main(["--validate", str(resolved.parents[1]), "--gpu", "cpu"]) == cli.OK
    assert "names no kind of object" in "".join(capsys.readouterr())
