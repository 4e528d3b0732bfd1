"""Single files in the layouts of the authors of models, written from diffusers folders; the inverse of the loaders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def weights(folder: Path, part: str) -> Tensors:
    """The weights of a part of a diffusers folder."""
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def _replaced(name: str, table: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old + ".")), name)


def ldm_unet(tensors: Tensors, layers: int = 1) -> Tensors:
    """A UNet2DConditionModel with ``layers`` per block as ``model.diffusion_model``."""
    result = {}
    attended = {match[1] for name in tensors if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    for name, tensor in tensors.items():
        new = _replaced(name, _UNET)
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if kind == "downsamplers":
                new = f"input_blocks.{1 + block * (layers + 1) + layers}.0.op.{rest.removeprefix('conv.')}"
            elif kind == "upsamplers":
                place = 2 if match[2] in attended else 1
                new = f"output_blocks.{block * (layers + 1) + layers}.{place}.{rest}"
            else:
                number = block * (layers + 1) + index + (side == "down")
                new = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"
        if "resnets" in name:
            head, _, kind = new.rpartition(".")
            before, _, layer = head.rpartition(".")
            new = f"{before}.{_RESNET[layer]}.{kind}"
        result[f"model.diffusion_model.{new}"] = tensor
    return result


def ldm_vae(tensors: Tensors, blocks: int, prefix: str = "first_stage_model.") -> Tensors:
    """An AutoencoderKL with a number of blocks, as ``first_stage_model``."""
    result = {}
    for name, tensor in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("mid_block.attentions.0", "mid.attn_1")
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        if "mid.attn_1" in new:
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])\.", r"\1.", new)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        result[prefix + new] = tensor
    return result


def clip(tensors: Tensors, prefix: str) -> Tensors:
    """A CLIP text encoder of transformers, whose names had the level ``text_model``."""
    names = {
        name: name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}" for name in tensors
    }
    count = next(len(tensor) for name, tensor in tensors.items() if "position_embedding" in name)
    positions = {f"{prefix}text_model.embeddings.position_ids": torch.arange(count)[None]}
    return {prefix + names[name]: tensor for name, tensor in tensors.items()} | positions


def open_clip(tensors: Tensors, prefix: str) -> Tensors:
    """A CLIP text encoder in the layout of OpenCLIP."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    renamed = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    result = {f"{prefix}logit_scale": torch.tensor(4.6)}
    for name, tensor in plain.items():
        if name == "text_projection.weight":
            result[f"{prefix}text_projection"] = tensor.T.contiguous()
        elif name in renamed:
            result[prefix + renamed[name]] = tensor
        elif match := re.match(r"(encoder\.layers\.\d+\.self_attn\.)q_proj\.(\w+)", name):
            joined = torch.cat([plain[f"{match[1]}{each}_proj.{match[2]}"] for each in "qkv"])
            layer = match[1].replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
            result[f"{prefix}{layer}in_proj_{match[2]}"] = joined
        elif not re.search(r"self_attn\.[kv]_proj", name):
            new = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
            new = new.replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2")
            result[prefix + new.replace("fc1", "mlp.c_fc").replace("fc2", "mlp.c_proj").replace("mlp.mlp", "mlp")] = (
                tensor
            )
    return result


_JOINT = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_JOINT_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_PROJECTIONS = {"x": ("to_q", "to_k", "to_v"), "context": ("add_q_proj", "add_k_proj", "add_v_proj")}
_NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}
_SECOND = {
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
}


def _exchanged(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first one."""
    return torch.cat(tensor.chunk(2)[::-1])


def joint_transformer(tensors: Tensors) -> Tensors:
    """An SD3Transformer2DModel as ``model.diffusion_model``."""
    result = {"pos_embed": tensors["pos_embed.pos_embed"]}
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    for kind in ("weight", "bias"):
        result |= {f"{new}.{kind}": tensors[f"{old}.{kind}"] for new, old in _JOINT.items()}
        result[f"final_layer.adaLN_modulation.1.{kind}"] = _exchanged(tensors[f"norm_out.linear.{kind}"])
        for block in range(count):
            old, new = f"transformer_blocks.{block}.", f"joint_blocks.{block}."
            for side, names in (
                ("x", ("to_q", "to_k", "to_v")),
                ("context", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                joined = torch.cat([tensors[f"{old}attn.{name}.{kind}"] for name in names])
                result[f"{new}{side}_block.attn.qkv.{kind}"] = joined
            if f"{old}attn2.to_q.{kind}" in tensors:
                joined = torch.cat([tensors[f"{old}attn2.{name}.{kind}"] for name in _PROJECTIONS["x"]])
                result[f"{new}x_block.attn2.qkv.{kind}"] = joined
            for name, source in (_JOINT_BLOCK | _NORMS | _SECOND).items():
                if f"{old}{source}.{kind}" in tensors:
                    result[f"{new}{name}.{kind}"] = tensors[f"{old}{source}.{kind}"]
        last = f"joint_blocks.{count - 1}.context_block.adaLN_modulation.1.{kind}"
        result[last] = _exchanged(result[last])
    return {f"model.diffusion_model.{name}": tensor for name, tensor in result.items()}


_FLUX = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
_SIDES = {
    "img": ("norm1", ("to_q", "to_k", "to_v"), "norm_", "ff", "to_out.0"),
    "txt": ("norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "ff_context", "to_add_out"),
}


def flux(tensors: Tensors, prefix: str = "") -> Tensors:
    """A FluxTransformer2DModel with one block of each kind in the layout of Black Forest Labs."""
    old, single, result = "transformer_blocks.0.", "single_transformer_blocks.0.", {}
    for kind in ("weight", "bias"):
        result |= {
            f"{new}.{kind}": tensors[f"{name}.{kind}"] for new, name in _FLUX.items() if f"{name}.{kind}" in tensors
        }
        result[f"final_layer.adaLN_modulation.1.{kind}"] = _exchanged(tensors[f"norm_out.linear.{kind}"])
        for side, (norm, projections, _, ff, out) in _SIDES.items():
            new = f"double_blocks.0.{side}_"
            result[f"{new}mod.lin.{kind}"] = tensors[f"{old}{norm}.linear.{kind}"]
            result[f"{new}attn.qkv.{kind}"] = torch.cat([tensors[f"{old}attn.{name}.{kind}"] for name in projections])
            result[f"{new}attn.proj.{kind}"] = tensors[f"{old}attn.{out}.{kind}"]
            result[f"{new}mlp.0.{kind}"] = tensors[f"{old}{ff}.net.0.proj.{kind}"]
            result[f"{new}mlp.2.{kind}"] = tensors[f"{old}{ff}.net.2.{kind}"]
        parts = [tensors[f"{single}{name}.{kind}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        result[f"single_blocks.0.linear1.{kind}"] = torch.cat(parts)
        result[f"single_blocks.0.linear2.{kind}"] = tensors[f"{single}proj_out.{kind}"]
        result[f"single_blocks.0.modulation.lin.{kind}"] = tensors[f"{single}norm.linear.{kind}"]
    for name, letter in (("query", "q"), ("key", "k")):
        result[f"single_blocks.0.norm.{name}_norm.scale"] = tensors[f"{single}attn.norm_{letter}.weight"]
        for side, (_, _, norm, _, _) in _SIDES.items():
            scale = tensors[f"{old}attn.{norm}{letter}.weight"]
            result[f"double_blocks.0.{side}_attn.norm.{name}_norm.scale"] = scale
    return {prefix + name: tensor for name, tensor in result.items()}
