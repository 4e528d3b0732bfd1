"""Tiny, randomly initialised folders in the layouts of DeepFloyd IF's stages I and II, built in code."""

import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

TEXT_WIDTH = 32


def build_t5(folder: Path) -> None:
    """T5 encoder and a tokenizer that knows single letters."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    T5Tokenizer(vocab=letters, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer")
    config = T5Config(
        vocab_size=len(letters),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        initializer_factor=2.0,
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


def build_deepfloyd(folder: Path, *, thresholding: bool, stage: int = 1) -> Path:
    """The parts of an IFPipeline or IFSuperResolutionPipeline, with 3 image channels and 6 output channels."""
    upscales = stage == 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_t5(folder)
        UNet2DConditionModel(
            sample_size=16,
            in_channels=6 if upscales else 3,
            class_embed_type="timestep" if upscales else None,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=24,
            encoder_hid_dim=TEXT_WIDTH,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
            attention_head_dim=8,
            norm_num_groups=4,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
        ).save_pretrained(folder / "unet")
    DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        clip_sample=True,
        thresholding=thresholding,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    ).save_pretrained(folder / "scheduler")
    if upscales:
        noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        noising.save_pretrained(folder / "image_noising_scheduler")
    index = {
        "_class_name": "IFSuperResolutionPipeline" if upscales else "IFPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": [None, None],
    }
    if upscales:
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
