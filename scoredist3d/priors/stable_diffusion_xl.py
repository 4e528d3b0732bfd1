"""The family of Stable Diffusion XL (arXiv 2307.01952), base and turbo: two text encoders and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoredist3d.priors.conditioning import Conditioning
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.pipeline_family import Family
from scoredist3d.priors.stable_diffusion import UNetDenoiser
from scoredist3d.priors.text_encoding import TextEncoder
from scoredist3d.priors.unet_support import check_unet

PIPELINE = "StableDiffusionXLPipeline"
_SIZES = 6
"""Numbers of the size conditioning: original size, crop and target size, two each."""


class SizedUNet(UNetDenoiser):
    """A UNet2DConditionModel that attends to two text encoders and takes a pooled text embedding and image sizes."""

    upcasts_autoencoder = True

    @property
    def used_options(self) -> frozenset[str]:
        """The three image sizes."""
        return frozenset({"original_size", "crop_top_left", "target_size"})

    @classmethod
    def check(cls, source: PipelineSource) -> None:
        """Check that the UNet takes six image sizes, as the base and turbo models do."""
        check_unet(source, added=("text_time",))
        config = source.network_config("unet")
        width = source.network_config("text_encoder_2").get("projection_dim", 0)
        sizes = (config["projection_class_embeddings_input_dim"] - width) / config["addition_time_embed_dim"]
        if sizes != _SIZES:
            raise PriorError(
                f"{source.key}: the UNet of {source.name} takes {sizes:g} image sizes, not {_SIZES}; use a base or "
                "turbo model, not a refiner"
            )

    def inputs(self, conditioning: Conditioning) -> Mapping[str, Tensor | None]:
        """Text embedding and pooled text embedding."""
        return {"encoder_hidden_states": conditioning.text, "text_embeds": conditioning.pooled}

    def call(self, x: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The UNet's output with the configured image sizes, by default those of the latents."""
        size = (self.factor * x.shape[2], self.factor * x.shape[3])
        options = self.options
        numbers = (
            *(options.original_size or size),
            *(options.crop_top_left or (0, 0)),
            *(options.target_size or size),
        )
        added = {"text_embeds": inputs["text_embeds"], "time_ids": x.new_tensor(numbers).expand(len(x), _SIZES)}
        text = {"encoder_hidden_states": inputs["encoder_hidden_states"], "added_cond_kwargs": added}
        return super().call(x, timestep, text)


class TwoTextEncoders(nn.Module):
    """Two CLIP encoders side by side; the second one also provides the pooled embedding."""

    def __init__(self, source: PipelineSource, precision: Precision) -> None:
        """Load the encoders on the CPU.

        Raises:
            PriorError: A part is missing or incomplete.
        """
        super().__init__()
        self.training = False
        self.clip = TextEncoder.load(source, precision)
        self.clip_2 = TextEncoder.load(source, precision, suffix="_2", warns=False)
        self._empty_is_zero = bool(source.index.get("force_zeros_for_empty_prompt", True))

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Hidden states (B, L, D) and pooled embeddings (B, P) in float32.

        Both are zero for an empty prompt if the pipeline's index sets ``force_zeros_for_empty_prompt``, as in
        StableDiffusionXLPipeline without a negative prompt.
        """
        outputs = [encoder.outputs(prompts, all_layers=True) for encoder in (self.clip, self.clip_2)]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
        pooled = outputs[1].text_embeds.float()
        if self._empty_is_zero:
            kept = text.new_tensor([float(bool(prompt)) for prompt in prompts])
            text, pooled = text * kept[:, None, None], pooled * kept[:, None]
        return Conditioning(text, pooled=pooled)


STABLE_DIFFUSION_XL = Family(SizedUNet, TwoTextEncoders, pipelines=(PIPELINE,))
