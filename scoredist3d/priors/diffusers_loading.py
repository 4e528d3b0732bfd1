"""Reading the parts of a diffusers pipeline folder or hub repository, one by one and strictly.

Pipelines are not used: importing one costs seconds, and a pipeline fills missing weights with random numbers after a
warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scoredist3d.priors.base import vocabulary_of
from scoredist3d.priors.quiet import quiet_libraries

_log = logging.getLogger("scoredist3d")

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "assets" / "prior"
_INDEX = "model_index.json"
MODEL_KEY = "prior.pretrained_model_name_or_path"


class PriorError(ValueError):
    """A prior that cannot be loaded; the message names the folder and the part."""


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline's parts come from.

    Attributes:
        name: Local folder or hub id.
        folder: The local folder, or None for a hub id.
        revision, variant: As diffusers understands them.
        index: The content of ``model_index.json``.
    """

    name: str
    folder: Path | None
    revision: str | None
    variant: str | None
    index: dict[str, Any]

    @classmethod
    def open(cls, name: str, *, revision: str | None = None, variant: str | None = None) -> PipelineSource:
        """Find the pipeline and read its index.

        Args:
            name: ``embedded``, a local folder, or a hub id ``owner/model``.
            revision: Branch, tag or commit of a hub id.
            variant: Weight files to prefer, e.g. ``fp16``.

        Raises:
            PriorError: Neither a complete folder nor a reachable hub id.
        """
        path = EMBEDDED_FOLDER if name == EMBEDDED else Path(name).expanduser()
        if path.is_dir():
            return cls(str(path), path, revision, variant, _read_index(path))
        if name == EMBEDDED:
            raise PriorError(
                f"{MODEL_KEY}: the embedded prior is not at {path}; reinstall scoredist3d, train it with "
                "scripts/train_prior.py, or name another diffusers folder"
            )
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise PriorError(f"{MODEL_KEY}: {name!r} is no folder here and no hub id of the form owner/model")
        _log.info("reading %s from the Hugging Face Hub, or from its local cache", name)
        return cls(name, None, revision, variant, dict(_read_json(_download(name, _INDEX, revision))))

    def has(self, part: str) -> bool:
        """Whether the pipeline lists this part (a part it leaves out is ``[null, null]``)."""
        return bool((self.index.get(part) or [None])[0])

    def load(self, part: str, **keywords: Any) -> Any:
        """The part, built by the class that the index names, with every weight from the files.

        Raises:
            PriorError: Not listed, missing, unreadable or incomplete.
        """
        cls = self._class_of(part)
        if self.index[part][0] == "transformers":
            # Without it, transformers asks on the terminal whether to run code of the folder. Diffusers refuses anyway.
            keywords["trust_remote_code"] = False
        try:
            # Weights that the files lack are drawn from the global random stream before they can be reported.
            with quiet_libraries(), torch.random.fork_rng(devices=[]):
                return cls.from_pretrained(self.name, subfolder=part, **self._options(), **keywords)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise PriorError(
                f"{MODEL_KEY}: the {part} of {self.name} cannot be loaded: {_first_line(error)}"
            ) from error

    def load_network(self, part: str, dtype: torch.dtype) -> nn.Module:
        """A frozen network in evaluation mode.

        Raises:
            PriorError: As :meth:`load`, and where weights are missing from the files.
        """
        keywords: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
        if self.variant is not None:
            keywords["variant"] = self.variant
        if self.has(part) and self.index[part][0] == "diffusers":
            # Asked for by default, and without accelerate declined with a warning for each network.
            keywords["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
        else:
            keywords["ignore_mismatched_sizes"] = True  # refused below, with the shapes
        network, info = self.load(part, **keywords)
        self._require_complete(part, info)
        return network.requires_grad_(False).eval()

    def _require_complete(self, part: str, info: dict[str, Any]) -> None:
        """Refuse a network that the files do not fill."""
        missing = sorted(info["missing_keys"])
        if missing:
            raise PriorError(
                f"{MODEL_KEY}: the {part} of {self.name} lacks {len(missing)} weights, the first is {missing[0]}"
            )
        mismatched = sorted(info["mismatched_keys"])
        if mismatched:
            key, found, wanted = mismatched[0]
            raise PriorError(
                f"{MODEL_KEY}: {len(mismatched)} weights of the {part} of {self.name} do not have the shapes of its "
                f"config.json; the first is {key}, {tuple(found)} where {tuple(wanted)} is expected"
            )

    def vocabulary(self) -> frozenset[str] | None:
        """Words of ``vocabulary.json`` (a list of words, or an object with the list under "words"), where there is one.

        Raises:
            PriorError: The file is there and is neither.
        """
        path = None if self.folder is None else self.folder / "vocabulary.json"
        if path is None or not path.is_file():
            return None
        content = _read_json(path)
        entries = content.get("words") if isinstance(content, dict) else content
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise PriorError(f'{MODEL_KEY}: {path} must be a list of words or {{"words": [...]}}')
        return vocabulary_of(entries)

    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration, without building a scheduler."""
        if not self.has("scheduler"):
            raise PriorError(f"{MODEL_KEY}: {self.name} has no scheduler in its {_INDEX}")
        if self.folder is not None:
            path = self.folder / "scheduler" / "scheduler_config.json"
            if not path.is_file():
                raise PriorError(f"{MODEL_KEY}: {self.name} is incomplete: scheduler/scheduler_config.json is missing")
            return _read_json(path)
        return dict(self.load("scheduler").config)

    def network_config(self, part: str) -> dict[str, Any]:
        """The content of a network's ``config.json``, read without its weights.

        Raises:
            PriorError: Not listed, missing or unreadable.
        """
        self._class_of(part)
        if self.folder is None:
            return dict(_read_json(_download(self.name, f"{part}/config.json", self.revision)))
        path = self.folder / part / "config.json"
        if not path.is_file():
            raise PriorError(f"{MODEL_KEY}: {self.name} is incomplete: {part}/config.json is missing")
        return dict(_read_json(path))

    def _class_of(self, part: str) -> Any:
        """The class that the index names for a part."""
        if not self.has(part):
            raise PriorError(f"{MODEL_KEY}: {self.name} has no {part} in its {_INDEX}")
        library, name = self.index[part]
        if library not in ("diffusers", "transformers"):
            raise PriorError(
                f"{MODEL_KEY}: the {part} of {self.name} is a {library}.{name}; "
                "only diffusers and transformers are known"
            )
        cls = getattr(importlib.import_module(library), name, None)
        if cls is None:
            raise PriorError(
                f"{MODEL_KEY}: the {part} of {self.name} is a {name}, which the installed {library} does not have"
            )
        if self.folder is not None and not (self.folder / part).is_dir():
            raise PriorError(f"{MODEL_KEY}: {self.name} is incomplete: its folder {part}/ is missing")
        return cls

    def _options(self) -> dict[str, Any]:
        return {} if self.folder is not None or self.revision is None else {"revision": self.revision}


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    if not path.is_file():
        raise PriorError(f"{MODEL_KEY}: {folder} is no diffusers pipeline: {_INDEX} is missing")
    index = _read_json(path)
    if not isinstance(index, dict):
        raise PriorError(f"{MODEL_KEY}: {path} must be a JSON object")
    return index


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PriorError(f"{MODEL_KEY}: {path} is no valid JSON: {error}") from error


def _download(name: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with quiet_libraries():
            return Path(hf_hub_download(name, file, revision=revision))
    except (OSError, ValueError) as error:
        raise PriorError(
            f"{MODEL_KEY}: {name!r} is no folder here and cannot be fetched from the hub: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
