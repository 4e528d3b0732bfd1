"""Strict loading of the parts of a diffusers pipeline from a folder or a hub repository.

diffusers' pipeline classes are not used: importing one takes seconds, and they initialize missing weights randomly with
only a warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import nn

from scoredist3d.config.errors import FieldError
from scoredist3d.limits import MAX_TRAIN_TIMESTEPS
from scoredist3d.priors.hub import INDEX, hub_problem
from scoredist3d.priors.model_files import (
    MODEL_KEY,
    PICKLE_KEY,
    PriorError,
    download_file,
    find_model,
    first_line,
    read_index,
    read_json,
    read_vocabulary,
)
from scoredist3d.priors.part_files import check_part, is_part_class
from scoredist3d.priors.quiet import quiet_libraries
from scoredist3d.priors.textual_inversion import TextualInversion
from scoredist3d.priors.vocabulary import Vocabulary
from scoredist3d.reasons import is_out_of_memory

_log = logging.getLogger("scoredist3d")


class WeightAdapter(Protocol):
    """Changes of the weights of a model, such as a LoRA."""

    def apply(self, part: str, network: nn.Module) -> None:
        """Change the weights of a network, of which ``part`` is the name in the pipeline's index."""


@dataclass(frozen=True)
class PipelineSource:
    """A local pipeline folder or hub repository, from which parts are loaded.

    Attributes:
        name: Local folder or hub id.
        folder: The local folder, or None for a hub id.
        revision: Branch, tag or commit of a hub id.
        variant: Preferred variant of the weight files, e.g. ``fp16``.
        index: The content of ``model_index.json``.
        key: Configuration key that holds ``name``, for error messages.
        allow_pickle: Whether weights in pickle format are read; by default only safetensors are.
        adapters: Changes of the weights of the networks.
        inversions: Embeddings of new tokens of the text encoders.
        vae: The source of another autoencoder.
        subfolders: Folders of parts that are not in the folder of their name.
    """

    name: str
    folder: Path | None
    revision: str | None
    variant: str | None
    index: dict[str, Any]
    key: str = MODEL_KEY
    allow_pickle: bool = False
    adapters: tuple[WeightAdapter, ...] = ()
    inversions: tuple[TextualInversion, ...] = ()
    vae: PipelineSource | None = None
    subfolders: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        name: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        key: str = MODEL_KEY,
        allow_pickle: bool = False,
    ) -> PipelineSource:
        """Find the pipeline and read its index.

        Args:
            name: ``embedded``, ``embedded-flow``, a local folder, or a hub id ``owner/model``.
            revision: Branch, tag or commit of a hub id.
            variant: Preferred variant of the weight files, e.g. ``fp16``.
            key: Configuration key that holds ``name``, for error messages.
            allow_pickle: Whether weights in pickle format are read.

        Raises:
            PriorError: ``name`` is neither a pipeline folder nor a reachable hub id.
        """
        path = find_model(name, key)
        if path is not None:
            return cls(str(path), path, revision, variant, read_index(path, key), key, allow_pickle)
        _log.info("loading %s from the Hugging Face Hub or its local cache", name)
        index = dict(read_json(download_file(name, INDEX, revision, key), key))
        return cls(name, None, revision, variant, index, key, allow_pickle)

    @classmethod
    def open_part(cls, name: str, part: str, key: str, *, allow_pickle: bool = False) -> PipelineSource:
        """Find one part of a pipeline: in a folder or hub repository of its own, or in that of a pipeline.

        Args:
            name: The folder or hub id.
            part: Name of the part in the index of a pipeline.
            key: Configuration key that holds ``name``, for error messages.
            allow_pickle: Whether weights in pickle format are read.

        Raises:
            PriorError: ``name`` is neither, or has no such part.
        """
        path = find_model(name, key)
        try:
            return cls.open(name, key=key, allow_pickle=allow_pickle)
        except PriorError:
            if path is not None and not (path / "config.json").is_file():
                raise
        config = read_json(download_file(name, "config.json", None, key) if path is None else path / "config.json", key)
        kind = config.get("_class_name") if isinstance(config, dict) else None
        index = {part: ["diffusers", str(kind)]}
        return cls(
            name if path is None else str(path), path, None, None, index, key, allow_pickle, subfolders={part: ""}
        )

    def has(self, part: str) -> bool:
        """Whether the pipeline's index lists this part; an omitted part is absent or ``[null, null]``."""
        entry = self.index.get(part)
        return isinstance(entry, list) and bool(entry) and bool(entry[0])

    def load(self, part: str, **keywords: Any) -> Any:
        """Load a part with the class that the index names.

        Args:
            part: Name of the part in the index, e.g. ``tokenizer``.
            keywords: Options of the class's ``from_pretrained``.

        Raises:
            PriorError: The part is not listed, or its files are missing or unreadable.
        """
        cls = self._class_of(part)
        if self.index[part][0] == "transformers":
            # Otherwise, transformers asks on the terminal whether to run code from the folder; diffusers' own classes
            # never run any.
            keywords["trust_remote_code"] = False
        # A hub repository is not inspected before, so the library's error says what is missing.
        pickles = self.folder is None and bool(keywords.get("use_safetensors"))
        with self.using(f"the {part}", "loaded", pickles=pickles):
            if self.folder is not None:
                check_part(self.folder / self._subfolder(part), cls, allow_pickle=self.allow_pickle, option=PICKLE_KEY)
            # The libraries initialize missing weights from the global random stream before they report them.
            with quiet_libraries(), torch.random.fork_rng(devices=[]):
                return cls.from_pretrained(self.name, subfolder=self._subfolder(part), **self._options(), **keywords)

    @contextmanager
    def using(
        self, what: str, done: str, *, errors: tuple[type[Exception], ...] = (Exception,), pickles: bool = False
    ) -> Iterator[None]:
        """Context manager that replaces errors of the libraries by errors about the pipeline.

        Args:
            what: What is used, e.g. ``the unet``.
            done: What fails, e.g. ``loaded``.
            errors: Types of the errors; files from others can make the libraries fail in every way.
            pickles: Whether weights in pickle format may be what is missing.

        Raises:
            PriorError: The body raised one of ``errors``, other than this one, one for a lack of memory, or a
                :class:`~scoredist3d.config.errors.FieldError`.
        """
        try:
            yield
        except (PriorError, FieldError):
            raise
        except errors as error:
            if is_out_of_memory(error):
                raise
            pickles = pickles and "safetensors" in str(error)
            hint = f"; set {PICKLE_KEY}=true if its weights are pickles (.bin)" if pickles else ""
            problem = hub_problem(error, self.name) if self.folder is None else None
            reason = f"the model {problem}" if problem and not hint else f"{first_line(error)}{hint}"
            raise PriorError(f"{self.key}: {what} of {self.name} cannot be {done}: {reason}") from error

    def load_network(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Load a network, frozen and in evaluation mode.

        Args:
            part: Name of the network in the index, e.g. ``unet``.
            dtype: Data type of the weights.

        Raises:
            PriorError: The part is not listed, its files are missing or unreadable, or they lack weights.
        """
        # With None, the libraries prefer safetensors, and read pickles by torch.load with weights_only=True.
        safetensors = None if self.allow_pickle else True
        keywords: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "use_safetensors": safetensors}
        if self.variant is not None:
            keywords["variant"] = self.variant
        if self.has(part) and self.index[part][0] == "diffusers":
            # diffusers' default is True, which without accelerate causes a warning for each network.
            keywords["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
        else:
            keywords["ignore_mismatched_sizes"] = True  # reported below, with the shapes
            # The folder's config.json may name an implementation that is code on the hub.
            keywords["attn_implementation"] = None
        network, info = self.load(part, **keywords)
        self._require_complete(part, info)
        return self._adapted(part, network.requires_grad_(False).eval())

    def _adapted(self, part: str, network: nn.Module) -> nn.Module:
        """A network after the changes of its weights."""
        for adapter in self.adapters:
            adapter.apply(part, network)
        return network

    def _require_complete(self, part: str, info: dict[str, Any]) -> None:
        """Check that the files contained every weight of a network.

        Raises:
            PriorError: Weights are missing or have the wrong shape.
        """
        missing = sorted(info["missing_keys"])
        if missing:
            raise PriorError(
                f"{self.key}: the {part} of {self.name} lacks {len(missing)} weights; the first is {missing[0]}; "
                "download or export the model again"
            )
        mismatched = sorted(info["mismatched_keys"])
        if mismatched:
            key, found, wanted = mismatched[0]
            raise PriorError(
                f"{self.key}: {len(mismatched)} weights of the {part} of {self.name} do not have the shapes of its "
                f"config.json; the first is {key}, {tuple(found)} where {tuple(wanted)} is expected; use matching files"
            )

    def vocabulary(self) -> Vocabulary | None:
        """The content of the folder's ``vocabulary.json``; None for a hub id and for a folder without this file.

        Raises:
            PriorError: The file does not have the right form.
        """
        return None if self.folder is None else read_vocabulary(self.folder, self.key)

    def camera_extent(self) -> float | None:
        """The ``reference_extent`` of the folder's ``camera.json``; None for a pipeline without this file.

        It is half the visible height at the origin, in scene units, for which the translation in the camera embedding
        has length 1 (see :func:`~scoredist3d.priors.camera_embedding.camera_embedding`).

        Raises:
            PriorError: The file does not have this form.
        """
        path = None if self.folder is None else self.folder / "camera.json"
        if path is None or not path.is_file():
            return None
        content = read_json(path, self.key)
        extent = content.get("reference_extent") if isinstance(content, dict) else None
        if not isinstance(extent, int | float) or not 0 < extent < math.inf:
            raise PriorError(f'{self.key}: {path} must be {{"reference_extent": NUMBER}} with a positive number')
        return float(extent)

    def scheduler_config(self, part: str = "scheduler") -> dict[str, Any]:
        """The configuration of a scheduler.

        Raises:
            PriorError: The pipeline has no scheduler, or its configuration is missing or unreadable.
        """
        if not self.has(part):
            raise PriorError(
                f"{self.key}: {self.name} has no {part} in its {INDEX}; use a complete text-to-image pipeline"
            )
        if self.folder is not None:
            path = self.folder / part / "scheduler_config.json"
            if not path.is_file():
                raise PriorError(
                    f"{self.key}: {self.name} is incomplete: {part}/scheduler_config.json is missing; "
                    "download or export the model again"
                )
            config = read_json(path, self.key)
        else:
            config = dict(self.load(part).config)
        steps = config.get("num_train_timesteps", 1) if isinstance(config, dict) else None
        if not isinstance(steps, int) or not 1 <= steps <= MAX_TRAIN_TIMESTEPS:
            raise PriorError(
                f"{self.key}: the scheduler configuration of {self.name} must be a JSON object with at most "
                f"{MAX_TRAIN_TIMESTEPS:,} num_train_timesteps; download or export the model again"
            )
        return config

    def network_config(self, part: str) -> dict[str, Any]:
        """The content of a network's ``config.json``, read without loading the weights.

        Raises:
            PriorError: The network is not listed, or its configuration is missing or unreadable.
        """
        self._class_of(part)
        file = str(PurePosixPath(self._subfolder(part), "config.json"))
        if self.folder is None:
            return dict(read_json(download_file(self.name, file, self.revision, self.key), self.key))
        path = self.folder / file
        if not path.is_file():
            raise PriorError(
                f"{self.key}: {self.name} is incomplete: {file} is missing; download or export the model again"
            )
        return dict(read_json(path, self.key))

    def _class_of(self, part: str) -> Any:
        """The class that the index names for a part.

        Raises:
            PriorError: The part is not listed, its class is not available, or its folder is missing.
        """
        if not self.has(part):
            raise PriorError(
                f"{self.key}: {self.name} has no {part} in its {INDEX}; use a complete text-to-image pipeline"
            )
        entry = self.index[part]
        library, name = map(str, entry) if len(entry) == 2 else ("", str(entry))
        if library not in ("diffusers", "transformers"):
            raise PriorError(
                f"{self.key}: the {part} of {self.name} is a {library}.{name}; "
                "only classes of diffusers and transformers are supported"
            )
        if part.startswith("tokenizer") and library == "transformers" and name.endswith("Processor"):
            name = "PreTrainedTokenizerFast"  # a tokenizer and an image processor, of which the first is used
        cls = getattr(importlib.import_module(library), name, None)
        if cls is None:
            raise PriorError(
                f"{self.key}: the {part} of {self.name} is a {name}, which the installed {library} does not have; "
                f"update {library}"
            )
        if not is_part_class(cls):
            raise PriorError(
                f"{self.key}: the {part} of {self.name} is a {library}.{name}, which is not the class of a model, "
                "tokenizer or scheduler; use the folder of a text-to-image pipeline"
            )
        if self.folder is not None and not (self.folder / self._subfolder(part)).is_dir():
            raise PriorError(
                f"{self.key}: {self.name} is incomplete: its folder {part}/ is missing; "
                "download or export the model again"
            )
        return cls

    def _subfolder(self, part: str) -> str:
        """The folder of a part, relative to that of the pipeline."""
        return self.subfolders.get(part, part)

    def _options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` that select a version of a hub repository."""
        return {} if self.folder is not None or self.revision is None else {"revision": self.revision}
