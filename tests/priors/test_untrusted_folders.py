"""Model folders from others: they run no code, ask nothing, and only their safetensors are read by default."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scoredist3d.priors import part_files
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.priors.quiet import quiet_libraries

UNET, TEXT = Path("unet", "diffusion_pytorch_model.safetensors"), Path("text_encoder", "model.safetensors")
CODE = "import pathlib\npathlib.Path('ran').touch()\nfrom transformers import CLIPTextConfig as C, CLIPTextModel as M\n"


@pytest.fixture
def folder(folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline that a test may change, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(folders(), tmp_path / "changed"))


def load(folder: Path, **options: Any) -> DiffusersPrior:
    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path=str(folder), **options))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickled(folder: Path, file: Path, content: Any = None) -> None:
    """Replace safetensors by a pickle of the same weights, or of something else."""
    name = "pytorch_model.bin" if file == TEXT else "diffusion_pytorch_model.bin"
    torch.save(load_file(folder / file) if content is None else content, folder / file.parent / name)
    (folder / file).unlink()


def answer_yes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answer every question with y; returns the questions."""
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(str(text)) or "y")
    return asked


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("text_encoder", ["transformers", "AutoModel"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("vae", ["diffusers", "DiffusionPipeline"]),
        ("vae", ["diffusers", "AutoModel"]),
        ("text_encoder", ["transformers", "pipeline"]),
        ("text_encoder", ["transformers", "PreTrainedModel"]),
        ("text_encoder", ["evil", "Model"]),
        ("text_encoder", ["evil"]),
    ],
)
def test_code_in_a_folder_never_runs(
    folder: Path, part: str, entry: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer_yes(monkeypatch)
    classes = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.M", None]}
    for place in (folder, folder / "text_encoder", folder / "tokenizer"):
        (place / "evil.py").write_text(CODE)
    edit(folder / "text_encoder" / "config.json", auto_map=classes, model_type="evil")
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map=classes)
    edit(folder / "model_index.json", **{part: entry})
    with pytest.raises(PriorError, match=f"the {part} of .*changed"):
        load(folder)
    assert asked == [] and not Path("ran").exists() and "evil" not in sys.modules


def test_transformers_does_not_ask_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    asked = answer_yes(monkeypatch)
    with quiet_libraries(), pytest.raises(ValueError, match="custom code"):
        resolve_trust_remote_code(None, "model", has_local_code=False, has_remote_code=True)
    assert asked == []


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_implementation_from_the_hub_is_refused(
    folder: Path, key: str, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", None)
    edit(
        folder / "text_encoder" / "config.json",
        **({"text_config": {key: "some/kernel"}} if nested else {key: "some/kernel"}),
    )
    with pytest.raises(PriorError, match=rf"has (text_config\.)?{key}='some/kernel', which is code from the hub"):
        load(folder)


def test_an_implementation_in_the_library_is_not_used(folder: Path) -> None:
    edit(folder / "text_encoder" / "config.json", attn_implementation="flex_attention")
    network: Any = PipelineSource.open(str(folder)).load_network("text_encoder", torch.float32)
    assert network.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("file", [UNET, TEXT])
def test_pickled_weights_need_an_option(folder: Path, file: Path) -> None:
    expected = load(folder).embed(["a red mug"]).text
    pickled(folder, file)
    with pytest.raises(PriorError, match=r"its weights are a pickle, .*\.bin; .* set prior\.allow_pickle=true"):
        load(folder)
    torch.testing.assert_close(load(folder, allow_pickle=True).embed(["a red mug"]).text, expected)


def test_pickles_next_to_safetensors_are_not_read(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"damaged")
    load(folder)


@pytest.mark.parametrize("file", [UNET, TEXT])
def test_pickles_are_checked_like_checkpoints(folder: Path, file: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, ("ran",))

    pickled(folder, file, {"weight": Trap()})
    with pytest.raises(PriorError, match=r"\.bin is not a file of plain tensors: it contains posix\.mkdir"):
        load(folder, allow_pickle=True)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", "weights.bin"])
@pytest.mark.parametrize("file", [UNET, TEXT])
def test_an_index_of_weights_names_only_safetensors_next_to_it(folder: Path, file: Path, name: str) -> None:
    weights = load_file(folder / file)
    (folder / file).unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    with pytest.raises(PriorError, match=r"names the file '.*'; it may only name \.safetensors files next to it"):
        load(folder)


def test_safetensors_whose_header_and_size_disagree_are_refused(folder: Path) -> None:
    data = (folder / UNET).read_bytes()
    for changed in (data[:-8], data + bytes(8), (2**40).to_bytes(8, "little") + data[8:]):
        (folder / UNET).write_bytes(changed)
        with pytest.raises(PriorError, match=r"the unet of .* cannot be loaded"):
            load(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    with pytest.raises(PriorError, match=r"adapter_config\.json makes it an adapter for another model"):
        load(folder)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (UNET, b""),
        (UNET, safetensors(b"{")),
        (UNET, safetensors({"conv_in.weight": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))),
        (UNET, safetensors({"conv_in.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4))),
        (TEXT, safetensors(b'{"a": 1')),
        (TEXT.with_name("config.json"), b'{"hidden_size": true}'),
        (TEXT.with_name("config.json"), b"[]"),
        (TEXT.with_name("config.json"), b'{"num_hidden_layers": null, "model_type": ["clip_text_model"]}'),
        (Path("tokenizer", "tokenizer.json"), b'{"model": 3, "padding": 3}'),
        (Path("tokenizer", "tokenizer_config.json"), b'{"model_max_length": {}}'),
        (Path("scheduler", "scheduler_config.json"), b'{"trained_betas": [0.5, 2.0]}'),
        (Path("scheduler", "scheduler_config.json"), b'{"beta_schedule": -0.5}'),
        (Path("scheduler", "scheduler_config.json"), b'{"beta_start": [1]}'),
        (Path("scheduler", "scheduler_config.json"), b"[1]"),
        (Path("vae", "config.json"), b'{"block_out_channels": true}'),
        (Path("model_index.json"), b'{"unet": [1]}'),
        (Path("model_index.json"), b'{"unet": [["diffusers"], "UNet2DConditionModel"]}'),
    ],
)
def test_damaged_files_are_one_message(folder: Path, file: Path, content: bytes) -> None:
    """What the fuzzer found: errors of the libraries, of types that have nothing in common."""
    (folder / file).write_bytes(content)
    with pytest.raises(PriorError, match=r"^prior\.pretrained_model_name_or_path: ") as caught:
        load(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("number", [1000, 2**63])
def test_a_config_with_more_layers_than_weights_builds_none(folder: Path, number: int) -> None:
    for part, key in (("unet", "transformer_layers_per_block"), ("text_encoder", "num_hidden_layers")):
        before = (folder / part / "config.json").read_text()
        edit(folder / part / "config.json", **{key: number})
        with pytest.raises(PriorError, match=rf"has {key}={number}, but there are only \d+ weights; use matching"):
            load(folder)
        (folder / part / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "attention_head_dim", 2**19),
        ("unet", "block_out_channels", [8, 2**19]),
        ("vae", "latent_channels", 2**19),
    ],
)
def test_a_config_with_more_parameters_than_bytes_allocates_none(folder: Path, part: str, key: str, value: Any) -> None:
    edit(folder / part / "config.json", **{key: value})
    with pytest.raises(PriorError, match=r"config\.json (describes [\d,]+ parameters, but the files|cannot be used)"):
        load(folder)


def test_a_text_encoder_without_sizes_allocates_none(folder: Path) -> None:
    """The defaults of the class describe a network of the published size."""
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({"model_type": json.loads(path.read_text())["model_type"]}))
    with pytest.raises(PriorError, match=r"config\.json describes [\d,]+ parameters, but the files have [\d,]+ bytes"):
        load(folder)


@pytest.mark.parametrize("size", [0, -8, 3000])
def test_the_size_of_images_has_limits(folder: Path, size: int) -> None:
    edit(folder / "unet" / "config.json", sample_size=size)
    with pytest.raises(PriorError, match=rf"images of {2 * size} pixels, .* use 8 to 4096, set with prior\.image_size"):
        load(folder)
    assert load(folder, image_size=16).image_size == 16


@pytest.mark.parametrize("key", ["max_position_embeddings", "vocab_size", "hidden_size"])
def test_a_config_with_larger_numbers_than_its_files_is_refused(folder: Path, key: str) -> None:
    edit(folder / "text_encoder" / "config.json", **{key: 2**31})
    with pytest.raises(PriorError, match=rf"config\.json has {key}=2147483648, which is too large for its weights"):
        load(folder)


@pytest.mark.parametrize("steps", [0, -1, 2**31, "1000", None])
def test_training_timesteps_have_a_limit(folder: Path, steps: Any) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=steps)
    with pytest.raises(PriorError, match=r"must be a JSON object with at most 100,000 num_train_timesteps"):
        load(folder)


def test_a_tokenizer_of_another_model_is_one_message(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {token: number + 1000 for token, number in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    with pytest.raises(PriorError, match=r"the (tokenizer|text encoder) of .* cannot be (loaded|used): "):
        load(folder).embed(["a red mug"])


def test_a_negative_number_of_tokens_is_one_message(folder: Path) -> None:
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=-8)
    with pytest.raises(PriorError, match=r"the text encoder of .* cannot be used: can't convert negative int"):
        load(folder).embed(["a red mug"])


def test_json_files_have_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "vocabulary.json"
    path.write_text("[" * 100_000)
    with pytest.raises(PriorError, match=r"vocabulary\.json is not valid JSON: it is nested too deeply"):
        load(folder)
    path.write_bytes(b'"\xff"')
    with pytest.raises(PriorError, match=r"vocabulary\.json is not valid JSON"):
        load(folder)
    path.unlink()
    size = (folder / "tokenizer" / "tokenizer.json").stat().st_size
    monkeypatch.setattr(part_files, "MAX_JSON_BYTES", size - 1)
    with pytest.raises(PriorError, match=r"tokenizer\.json is too large: it has [\d,]+ bytes"):
        load(folder)
