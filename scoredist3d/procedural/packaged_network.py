"""Base class of the small networks that evaluate images: saving and loading of their weights."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scoredist3d.files import atomic_path, write_atomically

ASSETS = Path(__file__).resolve().parents[1] / "assets"


class PackagedNetwork(nn.Module, ABC):
    """A network that is stored as ``config.json``, the arguments of its constructor, and fp16 weights.

    Attributes:
        name: Name of the network, of its weight file and of its folder in the package.
    """

    name: ClassVar[str]

    @abstractmethod
    def config(self) -> dict[str, object]:
        """The arguments of the constructor, which :meth:`load` reads from ``config.json``."""

    @classmethod
    def load(cls, folder: Path | None = None, device: torch.device | str = "cpu") -> Self:
        """Load a network in fp32 with frozen weights; by default the one that comes with the package.

        Raises:
            FileNotFoundError: The folder does not contain the network.
        """
        folder = ASSETS / cls.name if folder is None else folder
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} contains no {cls.name}; give a folder with config.json and {cls.name}.safetensors"
            )
        with torch.device("meta"):  # avoids a draw from the global random stream
            network = cls(**json.loads((folder / "config.json").read_text()))
        weights = {name: tensor.float() for name, tensor in load_file(folder / f"{cls.name}.safetensors").items()}
        network.load_state_dict(weights, assign=True)
        return network.to(device).eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the network to a folder, which is created if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_path(folder / f"{self.name}.safetensors") as temporary:
            save_file(weights, temporary)
        write_atomically(folder / "config.json", json.dumps(self.config()) + "\n")
