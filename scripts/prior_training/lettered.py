"""Second source of training data: signs and mugs with short words, rendered on the training device."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scoredist3d.priors.camera_embedding import camera_embedding
from scoredist3d.procedural import NUM_SOLIDS, cast_rays, shade, view_words
from scoredist3d.procedural.lettering import captions_for_lettered, lettering_cameras, render_lettered, sample_lettered

from .pool import RENDER_BLOCK, DenoiserBatch, composite

_SEED_OFFSET = 500
"""Added to the number of each filling, so that its seed differs from those of a pool with the same seed."""


class LetteredPool:
    """Views of objects with words: images, captions as token ids, cameras and, once encoded, latents.

    Every object has one view, near its front, over a white or a random gray background.

    Args:
        tokenizer: Tokenizer of the prior.
        objects: Number of objects.
        image_size: Width and height of the images in pixels.
        antialias: Rays per pixel along each axis.
        seed: Seed; each call of :meth:`fill` derives its own from it.
        device: Device for rendering and storage.
        compile_: Whether to compile the ray caster.
        held_out: Whether the words are held-out words, for evaluation, instead of training words.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        objects: int,
        image_size: int,
        antialias: int,
        seed: int,
        device: torch.device,
        compile_: bool,
        held_out: bool = False,
    ) -> None:
        self.tokenizer, self.count, self.image_size = tokenizer, objects, image_size
        self.antialias, self.seed, self.device, self.held_out = antialias, seed, device, held_out
        self._cast: Callable[..., Any] = cast_rays
        self._shade: Callable[..., Tensor] = shade
        if compile_:
            self._cast = torch.compile(partial(cast_rays, group=NUM_SOLIDS))
            self._shade = torch.compile(shade)
        self.rgba = torch.zeros(objects, image_size, image_size, 4, dtype=torch.uint8, device=device)
        self.latents: Tensor | None = None
        self.vae: AutoencoderKL | None = None
        self.empty_ids = self._tokenize([""])[0]

    def _tokenize(self, texts: list[str]) -> Tensor:
        """Padded and truncated token ids of texts, (len(texts), L), on the device."""
        limit = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        ids: Tensor = tokens.input_ids.to(torch.int16).to(self.device)
        return ids

    def fill(self, filling: int) -> None:
        """Replace the content by renders and captions of new objects, which are not yet encoded."""
        seed = self.seed * 1000 + _SEED_OFFSET + filling
        generator = torch.Generator(self.device).manual_seed(seed)
        lettered = sample_lettered(self.count, generator, held_out=self.held_out)
        cameras = lettering_cameras(lettered, self.image_size, generator)
        for start in range(0, self.count, RENDER_BLOCK):
            part = slice(start, start + RENDER_BLOCK)
            render = render_lettered(
                lettered[part],
                cameras[part],
                antialias=self.antialias,
                chunk_rays=1 << 22,
                cast=self._cast,
                shader=self._shade,
            )
            self.rgba[part] = (255 * render.rgba).round().to(torch.uint8)
        kind, gray = torch.rand(2, self.count, generator=generator, device=self.device)
        self.background = torch.where(kind < 0.5, torch.ones_like(gray), 0.1 + 0.9 * gray)
        rng = random.Random(seed)
        self.words = lettered.words
        self.ids_plain = self._tokenize(captions_for_lettered(lettered.to("cpu"), rng))
        words = view_words(cameras.to("cpu"))
        self.ids_view = self._tokenize(captions_for_lettered(lettered.to("cpu"), rng, views=words))
        self.camera = camera_embedding(cameras)
        self.latents = None

    def refresh(self, filling: int) -> None:
        """Replace the content by new objects and encode them with the same autoencoder."""
        self.fill(filling)
        if self.vae is not None:
            self.encode_with(self.vae)

    def images_at(self, index: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of the views at ``index``, each over its own background."""
        rgba = self.rgba[index].movedim(-1, 1).float() / 255.0
        return composite(rgba, self.background[index, None, None, None].expand(-1, 3, 1, 1))

    def random_images(self, count: int, generator: torch.Generator) -> Tensor:
        """Images (count, 3, H, W) in [0, 1] of random views, each over its own background."""
        return self.images_at(torch.randint(0, self.count, (count,), generator=generator, device=self.device))

    @torch.no_grad()
    def encode_with(self, vae: AutoencoderKL) -> None:
        """Encode every image; the latents are scaled by the autoencoder's ``scaling_factor``, as those of a pool."""
        self.vae = vae
        codes = []
        for index in torch.arange(self.count, device=self.device).split(1024):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                mean = vae.encode(2.0 * self.images_at(index) - 1.0).latent_dist.mean
            codes.append((vae.config.scaling_factor * mean.float()).half())
        self.latents = torch.cat(codes)

    def random_batch(self, count: int, generator: torch.Generator) -> DenoiserBatch:
        """Random training examples with random dropout of the conditioning.

        The camera is dropped for 20 % of the examples, the caption for 10 %, and both for 3 %. Captions may name the
        view for all examples without a camera and for 20 % of the others.

        Raises:
            RuntimeError: The pool is not encoded.
        """
        if self.latents is None:
            raise RuntimeError("the pool has no latents; call encode_with first")
        device = self.device
        index = torch.randint(0, self.count, (count,), generator=generator, device=device)
        chance = torch.rand(4, count, generator=generator, device=device)
        both, blind = chance[3] < 0.03, chance[0] < 0.2
        named = blind | (chance[1] < 0.2)
        ids = torch.where(named[:, None], self.ids_view[index], self.ids_plain[index])
        ids = torch.where((both | (chance[2] < 0.1))[:, None], self.empty_ids, ids)
        camera = self.camera[index] * ~(both | blind)[:, None]
        return DenoiserBatch(self.latents[index].float(), ids.long(), camera)
