"""Training data: a pool of captioned views of procedural objects, rendered on the training device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .compositing import composite, straight_alpha
from .models import reconstruct
from .parts import Part, Renderer, lettered_part, object_part, scene_part


@dataclass(frozen=True)
class DenoiserBatch:
    """Batch of training data: latents (B, C, h, w), token ids (B, L), camera embeddings (B, 16)."""

    latents: Tensor
    token_ids: Tensor
    camera: Tensor


@dataclass(frozen=True)
class PoolSizes:
    """Number of objects of each kind, and of views of each of them.

    Attributes:
        objects: Single objects.
        scenes: Scenes of two objects.
        lettered: Signs and mugs with a word, which only the autoencoder and the flow prior see.
        views: Views of each object, scene or sign.
        patterned: Share of the single objects whose pattern is not plain, with equal shares of all patterns; the others
            have the usual shares of patterns.
    """

    objects: int
    scenes: int
    lettered: int
    views: int
    patterned: float = 0.0


class Pool:
    """Views of random objects: RGBA images, captions as token ids, cameras, attributes and, once encoded, latents.

    The views of single objects come first, then those of scenes, then those of lettered objects.

    Args:
        tokenizer: Tokenizer of the prior.
        sizes: Numbers of objects and views.
        image_size: Width and height of the images in pixels.
        antialias: Rays per pixel along each axis.
        seed: Seed; each call of :meth:`fill` derives its own from it.
        device: Device for rendering and storage.
        compile_: Whether to compile the ray caster.
    """

    def __init__(
        self,
        tokenizer: Any,
        sizes: PoolSizes,
        *,
        image_size: int,
        antialias: int,
        seed: int,
        device: torch.device,
        compile_: bool,
    ) -> None:
        self.tokenizer, self.sizes, self.seed, self.device = tokenizer, sizes, seed, device
        self.image_size = image_size
        self._renderer = Renderer(image_size, antialias, device, compile_)
        self.data: Part | None = None
        self.latents: Tensor | None = None
        self.vae: AutoencoderKL | None = None
        self.empty_ids = self._tokenize([""])[0]

    @property
    def count(self) -> int:
        """Number of views in all."""
        return self.sizes.views * (self.sizes.objects + self.sizes.scenes + self.sizes.lettered)

    @property
    def count_of_objects(self) -> int:
        """Number of views of objects and scenes, which come first."""
        return self.sizes.views * (self.sizes.objects + self.sizes.scenes)

    @property
    def views(self) -> Part:
        """The content.

        Raises:
            RuntimeError: The pool is empty.
        """
        if self.data is None:
            raise RuntimeError("the pool is empty; call fill first")
        return self.data

    def _tokenize(self, texts: list[str]) -> Tensor:
        """Padded and truncated token ids of texts, (len(texts), L), on the device.

        Every word of the caption grammar is one token, so each distinct word is tokenized only once, which is a hundred
        times faster for a million captions. The first 64 texts are compared with the result of the tokenizer.

        Raises:
            RuntimeError: The results differ.
        """
        limit, pad = self.tokenizer.model_max_length, self.tokenizer.pad_token_id
        begin, end = [self.tokenizer.bos_token_id], [self.tokenizer.eos_token_id]
        known: dict[str, list[int]] = {}
        rows = []
        for text in texts:
            row = begin.copy()
            for word in text.replace(",", " ,").split():
                if word not in known:
                    known[word] = self.tokenizer(word, add_special_tokens=False).input_ids
                row += known[word]
            row = row[: limit - 1] + end
            rows.append(row + [pad] * (limit - len(row)))
        ids = torch.tensor(rows, dtype=torch.int16)
        head = texts[:64]
        expected = self.tokenizer(head, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        if not torch.equal(ids[: len(head)].long(), expected.input_ids):
            raise RuntimeError("the tokenizer splits a word of the caption grammar; rebuild it with build_tokenizer")
        return ids.to(self.device)

    def fill(self, filling: int) -> None:
        """Replace the content by renders and captions of new objects, which are not yet encoded."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1000 + filling)
        rng = random.Random(self.seed * 1000 + filling)
        makers: list[tuple[str, int, Callable[..., Part]]] = [
            ("object", self.sizes.objects, partial(object_part, patterned=self.sizes.patterned)),
            ("scene", self.sizes.scenes, scene_part),
            ("lettered", self.sizes.lettered, lettered_part),
        ]
        self.data = self.latents = None  # frees the memory before the new images are made
        parts = []
        for name, count, make in makers:
            if count:
                began = time.monotonic()
                parts.append(make(count, self.sizes.views, generator, rng, self._renderer, self._tokenize))
                total = count * self.sizes.views
                print(f"pool: {total:,} views, {name}, {time.monotonic() - began:.1f} s", flush=True)
        self.data = Part(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Part)})
        self.front = (self.data.azimuth[: self.count_of_objects].abs().rad2deg() < 45).nonzero()[:, 0]

    def refresh(self, filling: int) -> None:
        """Replace the content by new objects and encode them with the same autoencoder."""
        self.fill(filling)
        if self.vae is not None:
            self.encode_with(self.vae)

    @torch.no_grad()
    def encode_with(self, vae: AutoencoderKL) -> None:
        """Encode every image over its own background, degraded where its caption says so."""
        self.vae = vae
        codes = []
        generator = torch.Generator(self.device).manual_seed(self.seed)
        for start in range(0, self.count, 1024):
            index = torch.arange(start, min(start + 1024, self.count), device=self.device)
            image = self.images_at(index, generator)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                mean = vae.encode(2.0 * image - 1.0).latent_dist.mean
            codes.append((vae.config.scaling_factor * mean.float()).half())
        self.latents = torch.cat(codes)

    @torch.no_grad()
    def reconstructions(self, vae: AutoencoderKL) -> Tensor:
        """All images after the autoencoder, over their own backgrounds and without defects, (V, 3, H, W) uint8."""
        parts = []
        for index in torch.arange(self.count, device=self.device).split(1024):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                image = reconstruct(vae, self.images_at(index))
            parts.append((255 * image).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(parts)

    def random_index(
        self, count: int, generator: torch.Generator, *, lettered: bool = False, scenes: float | None = None
    ) -> Tensor:
        """Random indices of views (count,).

        Args:
            count: Number of indices.
            generator: Source of all randomness.
            lettered: Whether to include views of lettered objects beside those of objects and scenes.
            scenes: Share of views of scenes; by default that of the pool. The others are views of single objects.
        """
        limit = self.count if lettered else self.count_of_objects
        index = torch.randint(0, limit, (count,), generator=generator, device=self.device)
        if scenes is None or not self.sizes.scenes:
            return index
        first = self.sizes.views * self.sizes.objects
        u = torch.rand(count, generator=generator, device=self.device)
        return torch.where(u < scenes, first + index % (self.count_of_objects - first), index % first)

    def rgba_at(self, index: Tensor) -> Tensor:
        """Straight-alpha images (B, 4, H, W) in [0, 1] of the views at ``index``."""
        return straight_alpha(self.views.rgba[index])

    def images_at(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] over their own backgrounds.

        With a generator, they have the defects that their captions name.
        """
        background = self.views.background[index, None, None, None].expand(-1, 3, 1, 1)
        rgba = self.rgba_at(index)
        if generator is None:
            return composite(rgba, background)
        return self.views.degraded(rgba, background, index, generator)

    def random_batch(self, count: int, generator: torch.Generator, *, index: Tensor | None = None) -> DenoiserBatch:
        """Random training examples with random dropout of the conditioning.

        The camera is dropped for 20 % of the examples. Most of their captions name the view, and 60 % of them are front
        views, so that without a camera the prior behaves like a common text-to-image model with a bias towards front
        views. The caption alone is dropped for 10 % of the examples, which gives the unconditional prediction of
        classifier-free guidance; caption and camera are both dropped for 3 %.

        Args:
            count: Number of examples.
            generator: Source of all randomness.
            index: (count,), the views; by default random views of objects and scenes.

        Raises:
            RuntimeError: The pool is not encoded.
        """
        if self.latents is None:
            raise RuntimeError("the pool has no latents; call encode_with first")
        device, views = self.device, self.views
        chance = torch.rand(5, count, generator=generator, device=device)
        blind = chance[0] < 0.2
        if index is None:
            index = self.random_index(count, generator)
            front = self.front[torch.randint(0, len(self.front), (count,), generator=generator, device=device)]
            index = torch.where(blind & (chance[1] < 0.6), front, index)
        named_view = torch.where(blind, chance[2] < 0.8, chance[2] < 0.2)
        ids = torch.where(named_view[:, None], views.ids_view[index], views.ids_plain[index])
        ids = torch.where((chance[3] < 0.1)[:, None], self.empty_ids, ids)
        both = chance[4] < 0.03
        ids = torch.where(both[:, None], self.empty_ids, ids)
        camera = views.camera[index]
        camera = torch.where((blind | both)[:, None], torch.zeros_like(camera), camera)
        return DenoiserBatch(self.latents[index].float(), ids.long(), camera)


def build_pool(recipe: Any, tokenizer: Any, image_size: int, device: torch.device, compile_: bool) -> Pool:
    """The empty pool of a recipe with the fields of :class:`PoolSizes`, ``antialias`` and ``seed``."""
    return Pool(
        tokenizer,
        PoolSizes(recipe.objects, recipe.scenes, recipe.lettered, recipe.views, recipe.patterned),
        image_size=image_size,
        antialias=recipe.antialias,
        seed=recipe.seed,
        device=device,
        compile_=compile_,
    )
