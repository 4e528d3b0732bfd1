"""Modules of a denoising network where low-rank adapters are attached."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Names of the projections of the text in joint attention."""
_PARALLEL = ("to_qkv_mlp_proj", "to_out")
"""Names of the projections in layers of FLUX.2 that compute attention and MLP in parallel."""
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", *_JOINT, *_PARALLEL)
"""Names of the projections in attention layers."""


@dataclass(frozen=True)
class AdapterPoints:
    """Modules of a network where adapters are attached; the network's own weights stay unchanged.

    Attributes:
        network: The network that computes the predictions.
        linears: Paths of the linear layers that receive low-rank adapters.
        time_embedding: Path of the module whose output, a (B, ``width``) time embedding, can receive an additional
            condition.
        width: Size of the time embedding.
        text_width: Size D of the text embedding that the network attends to.
    """

    network: nn.Module
    linears: tuple[str, ...]
    time_embedding: str
    width: int
    text_width: int

    @classmethod
    def of_attention(cls, network: nn.Module, *, time_embedding: str, width: int, text_width: int) -> AdapterPoints:
        """The projections of all attention layers of a diffusers network; the other arguments are the attributes."""
        linears = attention_projections(network, PROJECTIONS)
        return cls(network, linears, time_embedding=time_embedding, width=width, text_width=text_width)


def attention_projections(network: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the linear layers of ``network`` that end with one of ``names``, e.g. ``to_q``, in module order."""
    modules = network.named_modules()
    return tuple(path for path, module in modules if path.endswith(names) and isinstance(module, nn.Linear))
