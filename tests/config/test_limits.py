"""Limits of configurations: the size of their files, and the numbers that determine memory."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scoredist3d import limits, registry
from scoredist3d.config import ConfigError
from scoredist3d.config.experiment import ExperimentConfig
from scoredist3d.config.fields import field_types
from scoredist3d.config.loader import load
from scoredist3d.config.validation import load_experiment

# Integers that determine time but not memory: steps, intervals and positions in time, and seeds.
TIME = (
    "steps",
    "every",
    "start",
    "end",
    "seed",
    "accumulate",
    "keep",
    "stride",
    "milestones",
    "n_steps",
    "level",
    "step",
)
FAST = Path(__file__).resolve().parents[2] / "configs" / "fast.yaml"


def has_int(hint: Any) -> bool:
    if hint is int or typing.get_origin(hint) is typing.Literal:
        return hint is int
    return any(map(has_int, typing.get_args(hint)))


def integers(cls: Any, seen: set[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and bounds of the integer options of a block and of the blocks in it."""
    if cls in seen:
        return
    seen.add(cls)
    for field in dataclasses.fields(cls):
        hint = field_types(cls)[field.name]
        if has_int(hint):
            yield f"{cls.__qualname__}.{field.name}", field.metadata.get("bounds", {})
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from integers(part, seen)


def test_every_integer_that_determines_memory_has_an_upper_bound() -> None:
    seen: set[Any] = set()
    blocks: list[Any] = [ExperimentConfig]
    blocks += [registry.lookup(kind, name).cls.Config for kind in registry.KINDS for name in registry.names(kind)]  # type: ignore[attr-defined]
    found = [item for block in blocks for item in integers(block, seen)]
    assert len(found) > 80
    unbounded = {name for name, bounds in found if bounds.get("le") is None and bounds.get("lt") is None}
    assert {name for name in unbounded if name.rsplit("_", 1)[-1].rsplit(".", 1)[-1] not in TIME} == set()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=100000000", r"data\.batch_size: .*4096"),
        ("data.batch_size=[4,4097]", r"data\.batch_size.*4096"),
        ("data.width=4097", r"data\.width: .*4096"),
        ("data.height=4097", r"data\.height: .*4096"),
        ("data.num_views=1000001", r"data\.num_views: .*1e\+06|1,?000,?000"),
        ("system.particles=4097", r"system\.particles: .*4096"),
        ("system.geometry.network.hidden_width=8193", r"hidden_width: .*8192"),
        ("system.geometry.grid.max_resolution=65537", r"max_resolution: .*65536"),
        ("system.geometry.num_features=1025", r"num_features: .*1024"),
        ("system.renderer.evaluation_chunk=16777217", r"evaluation_chunk: .*1677\d*|1\.67"),
        ("trainer.grace_seconds=1e10", r"grace_seconds: .*1e\+06|1000000"),  # too long for a timer of the system
        ("test.frames=10001", r"frames: .*10000"),
    ],
)
def test_numbers_beyond_a_limit_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment([FAST], ["prompt=a red mug", override])


def test_the_pixels_of_a_step_are_limited() -> None:
    sizes = ["data.height=4096", "data.width=4096", "data.resolution_milestones=[]"]
    load_experiment([FAST], ["prompt=a red mug", *sizes, "data.batch_size=16"])
    with pytest.raises(ConfigError, match=r"batch_size: 285,212,672 pixels per step are more than 268,435,456"):
        load_experiment([FAST], ["prompt=a red mug", *sizes, "data.batch_size=17"])


@pytest.mark.parametrize(
    "key", ["prompt", "negative_prompt", "output_root", "system.init_from", "system.prompt_processor.front_suffix"]
)
def test_texts_have_a_limit(key: str) -> None:
    longest = "x" * limits.MAX_TEXT
    load_experiment([FAST], ["prompt=a red mug", f"{key}={longest}"])
    with pytest.raises(ConfigError) as caught:
        load_experiment([FAST], ["prompt=a red mug", f"{key}={longest}x"])
    assert str(caught.value) == f"{key}: has 4,097 characters, but may have at most 4,096; shorten it"


@pytest.mark.parametrize("block", ["system.loss.{}.type=sparsity", "system.optimizer.lr_groups={{{}: 0.1}}"])
def test_names_of_entries_have_a_limit(block: str) -> None:
    longest = "x" * limits.MAX_LABEL
    load_experiment([FAST], ["prompt=a red mug", block.format(longest)])
    with pytest.raises(
        ConfigError, match=r"^system\.(loss|optimizer\.lr_groups): the name 'x+ \.\.\. has 201 characters"
    ):
        load_experiment([FAST], ["prompt=a red mug", block.format(longest + "x")])


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "[0, 1, .nan, 5]", "{from: 1, to: .inf, end: 3}"])
def test_numbers_are_finite(value: str) -> None:
    for key in ("system.optimizer.lr", "system.guidance.guidance_scale"):
        with pytest.raises(ConfigError, match=rf"^{key}: "):
            load_experiment([FAST], ["prompt=a red mug", f"{key}={value}"])


def test_files_have_a_limit_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    text = "prompt: x\n#"
    path.write_text(text.ljust(limits.MAX_CONFIG_BYTES, "-"))
    assert load([path]) == {"prompt": "x"}
    path.write_text(text.ljust(limits.MAX_CONFIG_BYTES + 1, "-"))
    with pytest.raises(
        ConfigError, match=r"a\.yaml is too large: it has 1,048,577 bytes, and a configuration may have"
    ):
        load([path])


def test_aliases_cannot_multiply(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1}\nb: *a\n")
    assert load([path]) == {"a": {"x": 1}, "b": {"x": 1}}
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 30)]
    for text in ("\n".join(["l0: &l0 [x]", *levels]), "a: &a [*a]\n"):
        path.write_text(text)
        with pytest.raises(
            ConfigError,
            match=r"a\.yaml, line \d+: (more than 100,000 values|an alias refers to the block that contains it)",
        ):
            load([path])


def test_deep_nesting_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text in ("a: " + "[" * 5000, "a: &a " + "[" * 5000):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"a\.yaml.*nested more than 60 levels deep"):
            load([path])
