"""Base class of priors that are loaded from a diffusers pipeline: a denoiser, an image codec and text encoders."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from scoredist3d.config import option
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.limits import MAX_RENDER_SIDE
from scoredist3d.paths import is_file
from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.base import Prior
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.diffusers_loading import PipelineSource, PriorError
from scoredist3d.priors.distillation import distillation_evidence
from scoredist3d.priors.frozen_network import Precision
from scoredist3d.priors.image_codec import load_codec, open_autoencoder, resize_shorter_side
from scoredist3d.priors.lora import LoraOptions, read_loras
from scoredist3d.priors.model_files import EMBEDDED, MISFITS, local_folder, read_vocabulary
from scoredist3d.priors.model_options import ModelOptions
from scoredist3d.priors.single_file import CONFIG_KEY, SingleFileSource
from scoredist3d.priors.textual_inversion import TextualInversionOptions, read_textual_inversions
from scoredist3d.priors.thresholding import SampleLimit
from scoredist3d.priors.vocabulary import Vocabulary

SMALLEST_IMAGE = 8
"""Smallest side of images in pixels."""


class PipelinePrior(Prior):
    """A prior composed of the parts of a diffusers pipeline.

    A subclass names the class of its denoiser, loads its text encoders in its constructor and implements
    :meth:`Prior.embed`.
    A pipeline without ``vae`` is a pixel-space model: its latents are channels-first images in [-1, 1].

    Latents, timesteps and predictions keep the caller's data type; only the networks compute in ``precision``, outside
    of autocast.

    Attributes:
        denoiser_class: Class of the denoising network, for subclasses of one model family.
        name: The pipeline's folder or hub id.
        denoiser: The denoising network.
        codec: Converts between images and latents.
    """

    @dataclass
    class Config(ModelOptions):
        """Options of the pipeline, its precision and its image size."""

        pretrained_model_name_or_path: str = option(
            EMBEDDED,
            "A diffusers pipeline folder or hub id, or a .safetensors file in the layout of its authors; 'embedded' is "
            "the small model that comes with the package.",
        )
        config: str | None = option(
            None,
            "For a single file: folder or hub id of a diffusers model with its configuration and what it lacks, e.g. "
            "tokenizers; or the name of a packaged layout, e.g. stable-diffusion-2-base. null recognizes the layout.",
        )
        revision: str | None = option(None, "Branch, tag or commit of a hub id.")
        variant: str | None = option(None, "Preferred variant of the weight files, e.g. fp16.")
        allow_pickle: bool = option(
            False,
            "Also read weights in the old pickle format (.bin) if a part has no safetensors. They are read with "
            "weights_only=True, which executes no code.",
        )
        lora: str | list[str | LoraOptions] | None = option(
            None,
            "LoRA that are added to the weights: a .safetensors file, a folder, a hub id, or a list of these "
            "or of {path, weight, file}.",
        )
        textual_inversion: str | list[str | TextualInversionOptions] | None = option(
            None,
            "Learned embeddings of new tokens for prompts: a file, a folder, a hub id, or a list of these or of "
            "{path, token, file}.",
        )
        vae: str | None = option(
            None, "Another autoencoder with the same latents: the folder or hub id of an autoencoder or of a pipeline."
        )
        precision: Precision = option(
            "auto",
            "Precision of the networks; auto is fp16 on CUDA (bf16 for models that need it) and fp32 elsewhere, "
            "auto-bf16 is bf16 on CUDA and fp32 elsewhere. bf16 on a CPU is far slower.",
        )
        image_size: int | None = option(
            None,
            "Side of the images that the denoiser receives, in pixels; null uses the size it was trained on.",
            ge=SMALLEST_IMAGE,
            le=MAX_RENDER_SIDE,
        )
        allow_unknown_nouns: bool = option(
            False,
            "Accept a prompt that names no kind of object that the prior knows, with a warning; --anyway sets it. "
            "Only priors whose vocabulary.json lists nouns, such as the embedded one, refuse such prompts.",
        )

    denoiser_class: ClassVar[type[DenoiserNetwork]]

    def __init__(
        self, config: Config, source: PipelineSource, denoiser_class: type[DenoiserNetwork] | None = None
    ) -> None:
        """Load the denoiser and the autoencoder on the CPU; move the prior with ``.to(device)``.

        Args:
            config: Options of the prior.
            source: The pipeline that ``config`` names; see :meth:`open`.
            denoiser_class: Class of the denoising network; by default :attr:`denoiser_class`.

        Raises:
            PriorError: A part is missing, incomplete, or not supported by this family.
        """
        super().__init__()
        self.config = config
        self.name = source.name
        self._source = source
        self.denoiser = (denoiser_class or self.denoiser_class)(source, config.precision)
        # Reserves the place of the text encoder, which subclasses load: the fingerprints of saved correctives depend on
        # the order of the parts.
        self.register_module("text", None)
        precision = self.denoiser.resolved(config.precision)
        self.codec = load_codec(source, precision, upcasts=self.denoiser.upcasts_autoencoder)
        if self.denoiser.channels != self.codec.channels:
            raise PriorError(
                f"{source.key}: the {self.denoiser.part} of {source.name} takes {self.denoiser.channels} channels, not "
                f"the {self.codec.channels} of a text-to-image model; inpainting and editing models are not supported"
            )
        self.image_size = config.image_size or self.denoiser.sample_size * self.codec.factor
        if not SMALLEST_IMAGE <= self.image_size <= MAX_RENDER_SIDE:
            raise PriorError(
                f"{source.key}: {source.name} was trained on images of {self.image_size} pixels, according to its "
                f"sample_size; use {SMALLEST_IMAGE} to {MAX_RENDER_SIDE}, set with prior.image_size"
            )
        self.denoiser.configure(config, self.codec.factor, self.image_size)
        self.schedule = self.denoiser.schedule
        self.takes_cameras = self.denoiser.takes_cameras
        self.distilled = distillation_evidence(source)
        vocabulary = source.vocabulary()
        if vocabulary is not None:
            self.vocabulary, self.nouns = vocabulary.words, vocabulary.nouns
            self.spells_quotes, self.adjectives = vocabulary.spells_quotes, vocabulary.adjectives
        self.allow_unknown_nouns = config.allow_unknown_nouns
        # The limits are those of pixel values and do not apply to latents.
        self._sample_limit = None if source.has("vae") else SampleLimit.from_scheduler_config(source.scheduler_config())

    @staticmethod
    def open(config: Config) -> PipelineSource:
        """The pipeline that the configuration names.

        Raises:
            PriorError: There is no such folder or hub id, or what is added to the model does not fit it.
        """
        file = Path(os.path.expanduser(config.pretrained_model_name_or_path))
        if is_file(file):
            source: PipelineSource = SingleFileSource.read(file, config.config)
        elif config.config is not None:
            raise PriorError(f"{CONFIG_KEY}: only single files need a configuration; remove the option")
        else:
            source = PipelineSource.open(
                config.pretrained_model_name_or_path,
                revision=config.revision,
                variant=config.variant,
                allow_pickle=config.allow_pickle,
            )
        parts = [part for part in source.index if source.has(part)]
        inversions = read_textual_inversions(config.textual_inversion, parts, allow_pickle=config.allow_pickle)
        vae = None if config.vae is None else open_autoencoder(config.vae, source)
        return replace(source, adapters=read_loras(config.lora, source), inversions=inversions, vae=vae)

    @classmethod
    def stated_vocabulary(cls, config: Config) -> Vocabulary | None:
        """The content of a local folder's ``vocabulary.json``; None for a hub id and for a folder without this file.

        Raises:
            PriorError: The file does not have the right form.
        """
        folder = local_folder(config.pretrained_model_name_or_path)
        return None if folder is None else read_vocabulary(folder)

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type in which the networks compute."""
        return self.denoiser.dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) from the denoiser's channels and the codec's reduction factor."""
        return (self.denoiser.channels, height // self.codec.factor, width // self.codec.factor)

    def encode(self, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Resize so that the shorter side is ``image_size``, map to [-1, 1] and encode; see :meth:`Prior.encode`."""
        multiple = self.codec.factor * self.denoiser.patch_size
        x = 2.0 * resize_shorter_side(rgb.movedim(-1, 1), self.image_size, multiple) - 1.0
        with self._source.using("the autoencoder", "used", errors=MISFITS):
            return self.codec.encode(x, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode and map to [0, 1]; see :meth:`Prior.decode`."""
        with self._source.using("the autoencoder", "used", errors=MISFITS):
            return (0.5 * self.codec.decode(latents).to(latents.dtype) + 0.5).movedim(1, -1)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """One call of the denoiser; see :meth:`DenoiserNetwork.predict`."""
        with self._source.using(f"the {self.denoiser.part}", "used", errors=MISFITS):
            return self.denoiser.predict(x_t, t, conditioning)

    def with_image(self, conditions: CFGConditions, latents: Tensor, generator: torch.Generator) -> CFGConditions:
        """The conditions with the image of :meth:`DenoiserNetwork.image_condition`, if the denoiser takes one."""
        image = self.denoiser.image_condition(latents.detach(), generator)
        if image is None:
            return conditions
        return conditions.map(lambda each: replace(each.expand(len(latents)), image=image))

    def adapter_points(self) -> AdapterPoints:
        """Modules of the denoiser where adapters can be attached."""
        return self.denoiser.adapter_points()

    def limit_x0(self, x0: Tensor) -> Tensor:
        """The predicted clean image, thresholded as the scheduler's configuration specifies for pixel-space models."""
        return x0 if self._sample_limit is None else self._sample_limit(x0)

    def sibling(self, name: str, *, key: str) -> DenoiserNetwork:
        """The denoiser of another pipeline, in automatic precision; see :meth:`Prior.sibling`."""
        other = type(self.denoiser)(PipelineSource.open(name, key=key, allow_pickle=self.config.allow_pickle), "auto")
        own_width, width = (denoiser.adapter_points().text_width for denoiser in (self.denoiser, other))
        if width != own_width:
            raise PriorError(
                f"{key}: {name} attends to text embeddings of width {width}, but the prior's text encoder "
                f"computes {own_width}-dimensional ones; use a model of the same family"
            )
        if other.channels != self.denoiser.channels:
            raise PriorError(
                f"{key}: {name} takes latents of {other.channels} channels, and the prior's latents have "
                f"{self.denoiser.channels}; use a model of the same family"
            )
        other.configure(self.config, self.codec.factor, self.image_size)
        t = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
        if not all(map(torch.allclose, other.schedule.coefficients(t), self.schedule.coefficients(t))):
            raise PriorError(
                f"{key}: the noise schedule of {name} is not the prior's; use a model trained on the same schedule"
            )
        return other
