"""Fast training steps on CUDA: channels-last layers, and the loss with its gradients as one CUDA graph.

The networks of the priors are so small that launching their kernels takes longer than running them. A CUDA graph
launches all of them at once, and needs no compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from scoredist3d.ops.backends import triton_interpreted

LossOf = Callable[..., Tensor]
_WARMUP = 3


def accelerate(module: nn.Module, *, compile_: bool = False) -> None:
    """Replace the forward functions of layers of diffusers' networks by faster ones, for training.

    Parameters and results stay the same. Group normalizations are fused with the SiLU behind them, and no layer leaves
    the channels-last layout. With ``compile_``, transformer blocks are compiled; those of one shape share the compiled
    code, which takes much less time than compiling the network.

    The module is set to evaluation mode, in which diffusers does not convert the layout; it must not contain dropout.
    Copies of the module would share its layers: copy it before.
    """
    module.eval()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in list(module.modules()):
        if isinstance(layer, nn.GroupNorm):
            _replace(layer, partial(_normalize, layer, activate=False))
    for layer in list(module.modules()):
        if isinstance(layer, ResnetBlock2D):
            _accelerate_block(layer)
        elif isinstance(layer, Upsample2D) and layer.interpolate and layer.use_conv:
            _replace(layer, partial(_upsample, layer))
        elif isinstance(layer, Transformer2DModel) and layer.use_linear_projection:
            layer._get_output_for_continuous_inputs = partial(_project, layer)  # type: ignore[method-assign]
        elif compile_ and isinstance(layer, BasicTransformerBlock | JointTransformerBlock):
            _replace(layer, torch.compile(layer.forward, dynamic=False))
        elif isinstance(layer, nn.Sequential):
            for norm, activation in pairwise(layer):
                if isinstance(norm, nn.GroupNorm) and isinstance(activation, nn.SiLU):
                    _fuse(norm, activation)
        last_norm, last_activation = getattr(layer, "conv_norm_out", None), getattr(layer, "conv_act", None)
        if isinstance(last_norm, nn.GroupNorm) and isinstance(last_activation, nn.Module):
            _fuse(last_norm, last_activation)


def _replace(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    layer.forward = forward  # type: ignore[method-assign]


def _fuse(norm: nn.GroupNorm, activation: nn.Module) -> None:
    _replace(norm, partial(_normalize, norm, activate=True))
    _replace(activation, _identity)


def _identity(x: Tensor) -> Tensor:
    return x


def _accelerate_block(block: ResnetBlock2D) -> None:
    """Fuse both normalizations with their activation; the time embedding gets an activation of its own."""
    for norm in (block.norm1, block.norm2):
        _replace(norm, partial(_normalize, norm, activate=True))
    block.nonlinearity = nn.Identity()
    if block.time_emb_proj is not None:
        _replace(block.time_emb_proj, partial(_time_projection, block.time_emb_proj))


def _normalize(norm: nn.GroupNorm, x: Tensor, *, activate: bool) -> Tensor:
    if x.ndim == 4 and (x.is_cuda or triton_interpreted()):
        from .group_norm import group_norm  # Triton may be missing on machines without a GPU

        return group_norm(x, norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps, activate=activate)
    output = functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return functional.silu(output) if activate else output


def _time_projection(layer: nn.Linear, embedding: Tensor) -> Tensor:
    return functional.linear(functional.silu(embedding), layer.weight, layer.bias)


def _upsample(layer: Any, x: Tensor, output_size: Any = None, **_: Any) -> Tensor:
    """Nearest-neighbour enlargement by 2 and a convolution, in the channels-last layout."""
    pixels = x.permute(0, 2, 3, 1)
    count, height, width, channels = pixels.shape
    large = pixels[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    output: Tensor = layer.conv(large.reshape(count, 2 * height, 2 * width, channels).permute(0, 3, 1, 2))
    return output


def _project(
    layer: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    projected: Tensor = layer.proj_out(hidden_states)
    return projected.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2) + residual


class GradientStep:
    """Computes a loss and its gradients; on CUDA as one CUDA graph, which the first call captures.

    Args:
        loss_of: Function from tensors to the scalar loss. It must not draw random numbers, synchronize, or read tensors
            that are replaced between calls.
        parameters: Parameters that get gradients.
        device: Device of the parameters. On CUDA the loss is computed in bf16 where autocast does so.
        capture: Whether to use a CUDA graph on CUDA.
    """

    def __init__(
        self, loss_of: LossOf, parameters: list[nn.Parameter], device: torch.device, *, capture: bool = True
    ) -> None:
        self.loss_of, self.parameters, self.device = loss_of, parameters, device
        self.capture = capture and device.type == "cuda"
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._loss: Tensor | None = None
        self._gradients: list[Tensor | None] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss for ``inputs``, detached; the gradients of the parameters are replaced."""
        if not self.capture:
            return self._compute(inputs)
        if self._graph is None:
            self._record(inputs)
        for target, source in zip(self._inputs, inputs, strict=True):
            target.copy_(source)
        self._graph.replay()
        # The graph writes to its own gradients; those of the parameters may belong to another graph.
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        assert self._loss is not None
        return self._loss

    def _compute(self, inputs: Any) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss_of(*inputs)
        loss.backward()
        return loss.detach()

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                self._compute(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._compute(self._inputs)
        self._gradients = [parameter.grad for parameter in self.parameters]
