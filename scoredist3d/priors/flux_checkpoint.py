"""Names of the weights of FLUX.1 in the files of its authors, converted to those of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_MODULATION = "final_layer.adaLN_modulation.1"
_RENAMED = {
    r"time_in\.in_layer": "time_text_embed.timestep_embedder.linear_1",
    r"time_in\.out_layer": "time_text_embed.timestep_embedder.linear_2",
    r"vector_in\.in_layer": "time_text_embed.text_embedder.linear_1",
    r"vector_in\.out_layer": "time_text_embed.text_embedder.linear_2",
    r"guidance_in\.in_layer": "time_text_embed.guidance_embedder.linear_1",
    r"guidance_in\.out_layer": "time_text_embed.guidance_embedder.linear_2",
    r"txt_in": "context_embedder",
    r"img_in": "x_embedder",
    r"final_layer\.linear": "proj_out",
    r"final_layer\.adaLN_modulation\.1": "norm_out.linear",
    r"double_blocks\.(\d+)\.img_mod\.lin": r"transformer_blocks.\1.norm1.linear",
    r"double_blocks\.(\d+)\.txt_mod\.lin": r"transformer_blocks.\1.norm1_context.linear",
    r"double_blocks\.(\d+)\.img_attn\.norm\.query_norm": r"transformer_blocks.\1.attn.norm_q",
    r"double_blocks\.(\d+)\.img_attn\.norm\.key_norm": r"transformer_blocks.\1.attn.norm_k",
    r"double_blocks\.(\d+)\.txt_attn\.norm\.query_norm": r"transformer_blocks.\1.attn.norm_added_q",
    r"double_blocks\.(\d+)\.txt_attn\.norm\.key_norm": r"transformer_blocks.\1.attn.norm_added_k",
    r"double_blocks\.(\d+)\.img_attn\.proj": r"transformer_blocks.\1.attn.to_out.0",
    r"double_blocks\.(\d+)\.txt_attn\.proj": r"transformer_blocks.\1.attn.to_add_out",
    r"double_blocks\.(\d+)\.img_mlp\.0": r"transformer_blocks.\1.ff.net.0.proj",
    r"double_blocks\.(\d+)\.img_mlp\.2": r"transformer_blocks.\1.ff.net.2",
    r"double_blocks\.(\d+)\.txt_mlp\.0": r"transformer_blocks.\1.ff_context.net.0.proj",
    r"double_blocks\.(\d+)\.txt_mlp\.2": r"transformer_blocks.\1.ff_context.net.2",
    r"single_blocks\.(\d+)\.modulation\.lin": r"single_transformer_blocks.\1.norm.linear",
    r"single_blocks\.(\d+)\.norm\.query_norm": r"single_transformer_blocks.\1.attn.norm_q",
    r"single_blocks\.(\d+)\.norm\.key_norm": r"single_transformer_blocks.\1.attn.norm_k",
    r"single_blocks\.(\d+)\.linear2": r"single_transformer_blocks.\1.proj_out",
}
_JOINT, _SINGLE = r"transformer_blocks.\1.attn.", r"single_transformer_blocks.\1."
_DIVIDED = {
    r"double_blocks\.(\d+)\.img_attn\.qkv": (_JOINT, ("to_q", "to_k", "to_v")),
    r"double_blocks\.(\d+)\.txt_attn\.qkv": (_JOINT, ("add_q_proj", "add_k_proj", "add_v_proj")),
    r"single_blocks\.(\d+)\.linear1": (_SINGLE, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
}
"""Layers that are several layers in diffusers, one above the other in the rows of the weight."""


def convert_flux(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The tensors with the names of ``FluxTransformer2DModel``; unknown ones keep their names.

    Args:
        tensors: The weights of the file, without a prefix.
        width: Number of channels of the tokens inside of the transformer.
    """
    converted = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        divided = next((pattern for pattern in _DIVIDED if re.fullmatch(pattern, layer)), None)
        renamed = next((pattern for pattern in _RENAMED if re.fullmatch(pattern, layer)), None)
        if divided is not None:
            prefix, layers = _DIVIDED[divided]
            rows = [width] * 3 + [len(tensor) - 3 * width] * (len(layers) - 3)
            for each, part in zip(layers, tensor.split(rows), strict=True):
                converted[f"{re.sub(divided, prefix, layer)}{each}.{kind}"] = part
        elif renamed is not None:
            if layer == _MODULATION:  # shift and scale are in the other order
                tensor = torch.cat(tensor.chunk(2)[::-1])
            converted[f"{re.sub(renamed, _RENAMED[renamed], layer)}.{kind}"] = tensor
        else:
            converted[name] = tensor
    return converted
