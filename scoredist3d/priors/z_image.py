"""The family of Z-Image, base and turbo: flow matching with a single-stream transformer and a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import PROMPT, TextEncoder

_PATCH = 2
_SAMPLE_SIZE, _LENGTH = 128, 512
"""Defaults of ZImagePipeline: 1024 pixels at 8 pixels per latent pixel, and the number of tokens of a prompt."""
_TEMPLATE = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen3's chat template for one message. The template of the folder, a program in Jinja, is not run."""


class SingleStreamTransformer(DenoiserNetwork):
    """A ZImageTransformer2DModel, which takes the text as a list of sequences without padding."""

    part = "transformer"
    networks = ("ZImageTransformer2DModel",)
    automatic = "auto-bf16"
    patch_size = _PATCH
    sample_size = _SAMPLE_SIZE

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the transformer takes no images."""
        super().check(source)
        config = source.network_config(cls.part)
        if config.get("siglip_feat_dim") is not None or _PATCH not in config.get("all_patch_size", (_PATCH,)):
            raise PriorError(
                f"{source.key}: the transformer of {source.name} needs image features or patches of another size; use "
                "a text-to-image model of the Z-Image family"
            )

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and the mask of its tokens."""
        return {"text": conditioning.text, "mask": conditioning.mask}

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The velocity: the network's timestep counts from noise to image, and its output points to the image."""
        texts = [text[mask > 0] for text, mask in zip(inputs["text"], inputs["mask"], strict=True)]
        output = self.network(list(x[:, :, None]), 1.0 - timestep / 1000.0, texts, return_dict=False)[0]
        return -torch.stack(list(output))[:, :, 0]

    def adapter_points(self) -> AdapterPoints:
        """The projections of all attention layers, and the timestep embedding."""
        return AdapterPoints.of_attention(
            self.network,
            time_embedding="t_embedder",
            width=self.network.t_embedder.mlp[-1].out_features,
            text_width=self.network.config.cap_feat_dim,
        )


class ChatTextEncoder(nn.Module):
    """A language model that reads the prompt as a message of a user."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the language model on the CPU.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        super().__init__()
        self.training = False
        self.model = TextEncoder.load(source, precision, length=_LENGTH, masks_padding=True, template=_TEMPLATE)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The penultimate hidden states (B, L, D) and the mask of their tokens (B, L), in float32."""
        text = self.model.outputs(prompts, all_layers=True).hidden_states[-2].float()
        return Conditioning(text, mask=self.model.mask(prompts))


Z_IMAGE = Family(SingleStreamTransformer, ChatTextEncoder, pipelines=("ZImagePipeline",))
