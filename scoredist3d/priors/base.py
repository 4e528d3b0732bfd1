"""Base class of all priors: a frozen denoiser with its noise schedule, image encoder and conditioning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from scoredist3d.cameras import Cameras
from scoredist3d.diffusion.prediction import Prediction
from scoredist3d.diffusion.schedule import NoiseSchedule
from scoredist3d.priors.adapters import AdapterPoints
from scoredist3d.priors.conditioning import CFGConditions, Conditioning
from scoredist3d.priors.denoiser import DenoiserNetwork
from scoredist3d.priors.vocabulary import Nouns, Vocabulary, words_of
from scoredist3d.priors.word_order import in_caption_order
from scoredist3d.procedural.words import spell_quoted


class Prior(nn.Module, ABC):
    """A frozen text-to-image diffusion model.

    Images are (B, H, W, 3) in [0, 1], latents (B, C, h, w) in the units that the denoiser was trained on. A prior has
    no trainable parameters; :meth:`encode` and :meth:`decode` are differentiable with respect to their input.

    Attributes:
        schedule: The model's noise schedule.
        image_size: Side of the square images that the model was trained on, in pixels.
        takes_cameras: Whether the denoiser is conditioned on cameras.
        views: Number of images that the denoiser processes jointly. Batches are multiples of it, and each group of
            ``views`` images has one common timestep.
        vocabulary: The words that the prior was trained on, if they are a known, limited set; otherwise None.
        nouns: The kinds of objects that the prior was trained on, if they are a known, limited set; otherwise None.
        spells_quotes: Whether quoted words of a prompt are spelled, because the prior draws them as text.
        adjectives: Groups of adjectives in the order in which the prior knows them; empty if any order will do.
        allow_unknown_nouns: Whether a prompt that names none of these kinds is accepted, with a warning.
        distilled: Why the model seems to be distilled for sampling without guidance; None if nothing shows that it is.
        given_warnings: Warnings about prompts and guidance that have been given, which are not repeated.
    """

    schedule: NoiseSchedule
    image_size: int
    takes_cameras: bool = False
    views: int = 1
    vocabulary: frozenset[str] | None = None
    nouns: Nouns | None = None
    spells_quotes: bool = False
    adjectives: tuple[tuple[str, ...], ...] = ()
    allow_unknown_nouns: bool = False
    distilled: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.given_warnings: set[str] = set()
        self.training = False

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of ``height`` x ``width`` pixels."""

    @abstractmethod
    def encode(self, rgb: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images (B, H, W, 3) of any size as latents of the model's size; differentiable.

        The result is the mean of the encoder's distribution, or a sample from it if a generator is given.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, H, W, 3), not clamped; differentiable."""

    @abstractmethod
    def embed(self, prompts: Sequence[str], cameras: Cameras | None = None) -> Conditioning:
        """One conditioning item per prompt; ``cameras`` has one camera per prompt."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """The denoiser's output for (B, C, h, w) latents at timesteps ``t`` (B,) in [0, 1]."""

    @classmethod
    def stated_vocabulary(cls, config: Any) -> Vocabulary | None:
        """Words and nouns of the prior that ``config`` describes, without loading it; None if they are not limited."""
        return None

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode, even if a parent module switches to training mode."""
        return super().train(False)

    def camera_condition(self, cameras: Cameras | None, batch: int) -> Tensor | None:
        """(batch, 16) camera embedding, zeros if ``cameras`` is None; None for a prior without camera conditioning."""
        return None

    def with_image(self, conditions: CFGConditions, latents: Tensor, generator: torch.Generator) -> CFGConditions:
        """The conditions of a step, completed by what the denoiser sees of the renders; unchanged for most priors.

        Args:
            conditions: Conditionings of the prompts.
            latents: (B, C, h, w), the latents of the renders; no gradient flows through them.
            generator: Source of noise.
        """
        return conditions

    def adapter_points(self) -> AdapterPoints | None:
        """Modules where adapters can be attached; None for a prior without a network."""
        return None

    def sibling(self, name: str, *, key: str) -> DenoiserNetwork:
        """The denoiser of another model that uses this prior's latents, noise schedule and text embedding.

        Args:
            name: The other model, in the same form as in the prior's configuration.
            key: Configuration key that holds ``name``, for error messages.

        Raises:
            ValueError: Priors of this class cannot load another model, or the model does not use this prior's latents,
                noise schedule and text embedding.
        """
        raise ValueError(f"{key}: a {type(self).__name__} cannot load another model; remove this option")

    def limit_x0(self, x0: Tensor) -> Tensor:
        """The predicted clean image (B, C, h, w), thresholded as in the model's own sampler."""
        return x0

    def worded(self, prompt: str) -> str:
        """The prompt as the prior was trained to read it: quoted words spelled, adjectives in its order."""
        text = spell_quoted(prompt) if self.spells_quotes else prompt  # first, so that no quoted word is moved
        return in_caption_order(text, self.adjectives)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt, in order, that are not in :attr:`vocabulary`; empty if there is no vocabulary."""
        if self.vocabulary is None:
            return []
        return [word for word in dict.fromkeys(words_of(self.worded(prompt))) if word not in self.vocabulary]
