"""Models in one file, in the layout of their authors: Stable Diffusion 1, 2, XL and 3, and FLUX.1.

The configuration comes from a layout that is packaged with the program, or from a folder. Names are converted by the
functions with which diffusers reads such files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.config.errors import brief
from scoredist3d.priors.diffusers_loading import PipelineSource
from scoredist3d.priors.flux_checkpoint import convert_flux
from scoredist3d.priors.frozen_network import cast_network
from scoredist3d.priors.model_files import MODEL_KEY, PriorError, opened_weights, read_weights
from scoredist3d.priors.part_files import build_network, check_numbers
from scoredist3d.priors.quiet import quiet_libraries
from scoredist3d.priors.vocabulary import Vocabulary

CONFIG_KEY = "prior.config"
LAYOUTS = Path(__file__).parent / "layouts"
_DENOISER, _VAE = "model.diffusion_model.", "first_stage_model."
_SEVERAL = "conditioner.embedders."
_IGNORED = ("position_ids", "logit_scale", "num_batches_tracked")
"""Ends of names of tensors that networks do not need."""
Tensors = dict[str, Tensor]
Convert = Callable[[Tensors, Mapping[str, Any], nn.Module], Tensors]


def _without(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _unet(tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(tensors, config)


def _vae(tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return convert_ldm_vae_checkpoint(tensors, config)


def _clip(prefix: str, tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    return _flattened(_without(prefix, tensors), network)


def _plain_pooled_clip(prefix: str, tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    """The first encoder of Stable Diffusion 3, whose pooled embedding is not projected."""
    identity = {"text_projection.weight": torch.eye(config["hidden_size"])}
    return _flattened(_without(prefix, tensors), network) | identity


def _open_clip(prefix: str, tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    converted = convert_open_clip_checkpoint(network, tensors, prefix=prefix)
    if not hasattr(network, "text_projection"):
        converted.pop("text_projection.weight", None)
    return _flattened(converted, network)


def _flattened(tensors: Tensors, network: nn.Module) -> Tensors:
    """Names without the level of CLIP's text encoder that transformers has removed, if the network lacks it."""
    return tensors if hasattr(network, "text_model") else _without("text_model.", tensors)


def _sd3(tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    return convert_sd3_transformer_checkpoint_to_diffusers(tensors)


def _flux(prefix: str, tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    return convert_flux(_without(prefix, tensors), config["num_attention_heads"] * config["attention_head_dim"])


def _t5(prefix: str, tensors: Tensors, config: Mapping[str, Any], network: nn.Module) -> Tensors:
    return _without(prefix, tensors)


def _reader(convert: Any, prefix: str) -> tuple[str, Convert]:
    return prefix, partial(convert, prefix)


_SD1 = {
    "unet": (_DENOISER, _unet),
    "vae": (_VAE, _vae),
    "text_encoder": _reader(_clip, "cond_stage_model.transformer."),
}
_SD2 = _SD1 | {"text_encoder": _reader(_open_clip, "cond_stage_model.model.")}
_SDXL = _SD1 | {
    "text_encoder": _reader(_clip, f"{_SEVERAL}0.transformer."),
    "text_encoder_2": _reader(_open_clip, f"{_SEVERAL}1.model."),
}
_SD3 = {
    "transformer": (_DENOISER, _sd3),
    "vae": (_VAE, _vae),
    "text_encoder": _reader(_plain_pooled_clip, "text_encoders.clip_l.transformer."),
    "text_encoder_2": _reader(_clip, "text_encoders.clip_g.transformer."),
    "text_encoder_3": _reader(_t5, "text_encoders.t5xxl.transformer."),
}
_FLUX = {
    "vae": ("vae.", _vae),
    "text_encoder": _reader(_clip, "text_encoders.clip_l.transformer."),
    "text_encoder_2": _reader(_t5, "text_encoders.t5xxl.transformer."),
}


def recognized(names: Iterable[str]) -> tuple[str, dict[str, tuple[str, Convert]]] | None:
    """The packaged layout of a file with these tensors, and the beginning of the names and the reader of each part.

    None for other files. The variant of Stable Diffusion 2 is not recognized; it is that with velocity.
    """
    found = set(names)

    def has(text: str) -> bool:
        return any(text in name for name in found)

    if has("double_blocks.0.img_attn.norm.key_norm.scale"):
        prefix = _DENOISER if has(f"{_DENOISER}double_blocks.") else ""
        return "flux-dev" if has("guidance_in.") else "flux-schnell", _FLUX | {"transformer": _reader(_flux, prefix)}
    if has("joint_blocks.0.context_block."):
        variant = "3.5-large" if has("joint_blocks.37.") else "3.5-medium" if has("x_block.attn2.") else "3-medium"
        return f"stable-diffusion-{variant}", _SD3
    if has(f"{_DENOISER}input_blocks."):
        if has(f"{_SEVERAL}1.model."):
            return "stable-diffusion-xl", _SDXL
        if has("cond_stage_model.model."):
            return "stable-diffusion-2", _SD2
        if has("cond_stage_model.transformer."):
            return "stable-diffusion-1", _SD1
    return None


@dataclass(frozen=True)
class SingleFileSource(PipelineSource):
    """A model in one file.

    Attributes:
        file: The file.
        layout: The source of the configurations.
        readers: The beginning of the names of the tensors of each network, and the function that converts them.
        others: The folder or hub id of what the file lacks.
    """

    file: Path = Path()
    layout: PipelineSource | None = None
    readers: Mapping[str, tuple[str, Convert]] | None = None
    others: str = ""

    @classmethod
    def read(cls, file: Path, config: str | None) -> SingleFileSource:
        """Recognize a file.

        Args:
            file: A safetensors file.
            config: Folder or hub id of a diffusers model, or name of a packaged layout; None selects a packaged layout
                by the names of the tensors.

        Raises:
            PriorError: The file is damaged or of an unknown layout.
        """
        if file.suffix != ".safetensors":
            raise PriorError(f"{MODEL_KEY}: {file} is not a .safetensors file; convert it to safetensors")
        with opened_weights(file, MODEL_KEY) as opened:
            names = list(opened.keys())
        found = recognized(names)
        if found is None:
            raise PriorError(
                f"{MODEL_KEY}: {file} is not a model of Stable Diffusion 1, 2, XL or 3 or FLUX.1 in the layout of its "
                f"authors (its first tensor is {brief(min(names, default='none'), 100)}); use a diffusers folder"
            )
        packaged = LAYOUTS / (config or found[0])
        if packaged.is_dir() and packaged.parent == LAYOUTS:
            layout = PipelineSource.open(str(packaged), key=CONFIG_KEY)
            others = str(layout.index["_name_or_path"])
        else:
            layout = PipelineSource.open(str(config), key=CONFIG_KEY)
            others = str(config)
        return cls(str(file), None, None, None, layout.index, file=file, layout=layout, readers=found[1], others=others)

    def load(self, part: str, **keywords: Any) -> Any:
        """Load a part that the file lacks, such as a tokenizer; see :meth:`PipelineSource.load`."""
        return self._elsewhere(part).load(part, **keywords)

    def load_network(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Load a network from the file, or from the folder if the file lacks it; see the base class."""
        prefix, convert = (self.readers or {}).get(part, ("", None))
        tensors = {} if convert is None else read_weights(self.file, self.key, prefix)[0]
        if convert is None or not tensors:
            return self._adapted(part, self._elsewhere(part).load_network(part, dtype))
        cls, config = self._class_of(part), self.network_config(part)
        with self.using(f"the {part}", "loaded"), quiet_libraries(), torch.random.fork_rng(devices=[]):
            check_numbers(config, len(tensors), self.file.stat().st_size)
            with _without_memory():
                network = build_network(cls, config)
            self._fill(part, network, convert(tensors, config, network))
        cast_network(network, dtype)
        return self._adapted(part, network.requires_grad_(False).eval())

    def _fill(self, part: str, network: nn.Module, tensors: Tensors) -> None:
        """Give a network its weights, all of which must be there in the right shapes."""
        tied = getattr(network, "_tied_weights_keys", None)
        for name, other in tied.items() if isinstance(tied, dict) else ():
            if name not in tensors and other in tensors:
                tensors[name] = tensors[other]
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_IGNORED)}
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        wrong = [name for name, shape in wanted.items() if name in tensors and tuple(tensors[name].shape) != shape]
        odd = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
        problem = ""
        if missing:
            problem = f"lacks {len(missing)} weights; the first is {missing[0]}"
        elif wrong:
            found = tuple(tensors[wrong[0]].shape)
            problem = f"has {found} where {wanted[wrong[0]]} is expected; the weight is {wrong[0]}"
        elif unknown:
            problem = f"has {len(unknown)} unknown weights; the first is {brief(unknown[0], 100)}"
        elif odd is not None:
            problem = f"has the type {tensors[odd].dtype} in {odd}, which is quantized or damaged"
        if problem:
            raise PriorError(
                f"{self.key}: the {part} of {self.name} {problem}; use a complete text-to-image model, or set "
                f"{CONFIG_KEY} to a folder with its configuration"
            )
        network.load_state_dict(tensors, assign=True)

    def _elsewhere(self, part: str) -> PipelineSource:
        """The source of what the file lacks."""
        try:
            other = PipelineSource.open(self.others, key=CONFIG_KEY, allow_pickle=self.allow_pickle)
        except PriorError as error:
            raise PriorError(
                f"{CONFIG_KEY}: {self.name} has no {part}, and {self.others}, from which it is taken, is not in the "
                f"cache or on the hub; set {CONFIG_KEY} to a diffusers folder that has it"
            ) from error
        return other

    def network_config(self, part: str) -> dict[str, Any]:
        """The configuration of a network, from the layout."""
        assert self.layout is not None
        return self.layout.network_config(part)

    def scheduler_config(self, part: str = "scheduler") -> dict[str, Any]:
        """The configuration of the scheduler, from the layout."""
        assert self.layout is not None
        return self.layout.scheduler_config(part)

    def vocabulary(self) -> Vocabulary | None:
        """None: a file states no vocabulary."""
        return None


def _without_memory() -> AbstractContextManager[Any]:
    """Context manager in which networks are built without memory for their parameters, if accelerate is installed."""
    if importlib.util.find_spec("accelerate") is None:
        return nullcontext()
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)
