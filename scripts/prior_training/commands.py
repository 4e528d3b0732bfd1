"""Options that the training scripts share."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def training_parser(description: str | None, recipe: Any, products: str) -> argparse.ArgumentParser:
    """Parser of a training script; every field of the recipe is an option.

    Args:
        description: The help text of the script.
        recipe: The recipe with its default values, a dataclass instance.
        products: Names of the folders that the script writes and can continue from.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the training states")
    parser.add_argument("--out", type=Path, required=True, help=f"target folder of {products}")
    parser.add_argument("--init", type=Path, help=f"folder with {products} from an earlier command, to continue from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--miniature", action="store_true", help="use tiny networks and a few steps, for tests")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not use torch.compile, which is the default on CUDA"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="only export the averaged weights of the last saved state"
    )
    for name, default in asdict(recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=None, help=f"default {default}")
    return parser


def recipe_of(arguments: argparse.Namespace, recipe: type[Any]) -> Any:
    """The recipe that the options describe, based on the miniature one if they ask for it."""
    base = asdict(recipe.miniature() if arguments.miniature else recipe())
    return recipe(**{**base, **{name: value for name in base if (value := getattr(arguments, name)) is not None}})


def training_device(arguments: argparse.Namespace) -> tuple[torch.device, bool]:
    """The device, and whether to use torch.compile; on CUDA, fast settings of matrix products are chosen."""
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device, device.type == "cuda" and not arguments.no_compile
