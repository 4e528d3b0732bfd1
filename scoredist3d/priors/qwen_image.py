"""The family of Qwen-Image: flow matching with a joint transformer on packed latents and a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.packed_latents import PATCH, PackedTransformer, packed, unpacked
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.text_encoding import PROMPT, TextEncoder

_LENGTH = 1024
_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    f"relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_TEMPLATE_TOKENS = 34
"""Values of QwenImagePipeline. Its tokens of the template before the prompt are not passed to the transformer."""


class MaskedJointTransformer(PackedTransformer):
    """A QwenImageTransformer2DModel, whose image tokens are patches of 2 x 2 latent pixels."""

    networks = ("QwenImageTransformer2DModel",)

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the transformer makes images from text."""
        super().check(source)
        config = source.network_config(cls.part)
        if any(config.get(key) for key in ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")):
            raise PriorError(
                f"{source.key}: the transformer of {source.name} needs distilled guidance or layers of images; use a "
                "text-to-image model of the Qwen-Image family"
            )

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and the mask of its tokens."""
        return {"text": conditioning.text, "mask": conditioning.mask}

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The unpacked output for latents, which are packed here; common padding of the text is removed."""
        mask = inputs["mask"] > 0
        longest = int(mask.sum(dim=1).max())
        mask = mask[:, :longest]
        output = self.network(
            hidden_states=packed(x),
            timestep=timestep.to(x.dtype) / 1000.0,
            encoder_hidden_states=inputs["text"][:, :longest],
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, x.shape[2] // PATCH, x.shape[3] // PATCH)]] * len(x),
            return_dict=False,
        )[0]
        return unpacked(output, x)


class TemplateTextEncoder(nn.Module):
    """A vision-language model that reads the prompt in a template."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the model on the CPU.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        super().__init__()
        self.training = False
        length = _LENGTH + _TEMPLATE_TOKENS
        self.model = TextEncoder.load(source, precision, length=length, masks_padding=True, template=_TEMPLATE)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The last hidden states (B, L, D), without the template before the prompt, and their mask, in float32."""
        states = self.model.outputs(prompts, all_layers=True).hidden_states[-1].float()
        masks = self.model.mask(prompts)
        texts = [text[mask > 0][_TEMPLATE_TOKENS:] for text, mask in zip(states, masks, strict=True)]
        pads = [(0, 0, 0, _LENGTH - len(text)) for text in texts]
        text = torch.stack([nn.functional.pad(text, pad) for text, pad in zip(texts, pads, strict=True)])
        lengths = masks.new_tensor([len(text) for text in texts])
        mask = (torch.arange(_LENGTH, device=masks.device) < lengths[:, None]).float()
        return Conditioning(text, mask=mask)


QWEN_IMAGE = Family(MaskedJointTransformer, TemplateTextEncoder, pipelines=("QwenImagePipeline",))
