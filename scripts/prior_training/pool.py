"""Training data: a pool of captioned views of procedural objects, rendered on the training device."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.priors.camera_embedding import camera_embedding
from scoredist3d.procedural import (
    NUM_SOLIDS,
    Dropout,
    azimuth_symmetry,
    captions_for,
    cast_rays,
    render_objects,
    sample_objects,
    shade,
    view_words,
)

DISTANCE, FOVY_DEG = 3.2, 40.0
RENDER_BLOCK = 256


@dataclass(frozen=True)
class Targets:
    """Targets of the probe: class indices (B,), azimuth (B,) in radians, symmetry order (B,)."""

    category: Tensor
    color: Tensor
    second_color: Tensor
    pattern: Tensor
    azimuth: Tensor
    symmetry: Tensor


@dataclass(frozen=True)
class DenoiserBatch:
    """Batch of training data: latents (B, C, h, w), token ids (B, L), camera embeddings (B, 16)."""

    latents: Tensor
    token_ids: Tensor
    camera: Tensor


def random_backgrounds(
    count: int, generator: torch.Generator, device: torch.device, *, white: float, gray: float
) -> Tensor:
    """Random background colors (count, 3, 1, 1).

    They are white with probability ``white``, a random gray with probability ``gray``, else a random color.
    """
    kind = torch.rand(count, generator=generator, device=device)[:, None]
    value = torch.rand(count, 3, generator=generator, device=device)
    shade = 0.1 + 0.9 * value[:, :1].expand(-1, 3)
    color = torch.where(kind < white, torch.ones_like(value), torch.where(kind < white + gray, shade, value))
    return color[:, :, None, None]


def composite(rgba: Tensor, background: Tensor, opacity: Tensor | float = 1.0) -> Tensor:
    """Composite straight-alpha images (B, 4, H, W) over colors (B, 3, 1, 1); the result is (B, 3, H, W) in [0, 1]."""
    alpha = rgba[:, 3:] * opacity
    return rgba[:, :3] * alpha + background * (1 - alpha)


def training_cameras(count: int, size: int, generator: torch.Generator, device: torch.device) -> Cameras:
    """Random cameras of the prior.

    The azimuth is uniform. The elevation is uniform in [-15, 60] degrees, and for 30 % of the cameras in [30, 90].
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    steep = torch.rand(count, generator=generator, device=device) < 0.3
    elevation = torch.where(steep, uniform(30.0, 90.0), uniform(-15.0, 60.0))
    distance = DISTANCE * uniform(0.95, 1.05)
    return orbit(uniform(0.0, 360.0), elevation, distance, torch.full_like(distance, FOVY_DEG), size, size)


class Pool:
    """Views of random objects: RGBA images, captions as token ids, cameras, attributes and, once encoded, latents.

    Args:
        tokenizer: Tokenizer of the prior.
        objects: Number of objects.
        views: Number of views per object.
        image_size: Width and height of the images in pixels.
        antialias: Rays per pixel along each axis.
        seed: Seed; each call of :meth:`fill` derives its own from it.
        device: Device for rendering and storage.
        compile_: Whether to compile the ray caster.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        objects: int,
        views: int,
        image_size: int,
        antialias: int,
        seed: int,
        device: torch.device,
        compile_: bool,
    ) -> None:
        self.tokenizer, self.objects, self.views = tokenizer, objects, views
        self.image_size, self.antialias, self.seed = image_size, antialias, seed
        self.device = device
        self._cast = torch.compile(partial(cast_rays, group=NUM_SOLIDS)) if compile_ else cast_rays
        self._shade = torch.compile(shade) if compile_ else shade
        self.count = objects * views
        self.rgba = torch.zeros(self.count, image_size, image_size, 4, dtype=torch.uint8, device=device)
        self.latents: Tensor | None = None
        self.vae: AutoencoderKL | None = None
        self.empty_ids = self._tokenize([""])[0]

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
        objects = sample_objects(self.objects, generator, self.device)
        views = objects.repeat_interleave(self.views)
        cameras = training_cameras(self.count, self.image_size, generator, self.device)
        for start in range(0, self.count, RENDER_BLOCK):
            part = slice(start, start + RENDER_BLOCK)
            render = render_objects(
                views[part],
                cameras[part],
                antialias=self.antialias,
                chunk_rays=1 << 22,
                cast=self._cast,
                shader=self._shade,
            )
            self.rgba[part] = (255 * render.rgba).round().to(torch.uint8)
        kind = torch.rand(self.count, generator=generator, device=self.device)
        shade = 0.1 + 0.9 * torch.rand(self.count, generator=generator, device=self.device)
        white = kind < 0.5
        self.background = torch.where(white, torch.ones_like(shade), shade)
        rng = random.Random(self.seed * 1000 + filling)
        backgrounds: list[str | None] = ["white" if flag else "gray" for flag in white.tolist()]
        plain = captions_for(views.to("cpu"), rng, backgrounds=backgrounds, dropout=Dropout(empty=0.0))
        self.ids_plain = self._tokenize([caption.text for caption in plain])
        words = view_words(cameras.to("cpu"))
        dropout = Dropout(empty=0.0, view=0.0)
        named = captions_for(views.to("cpu"), rng, views=words, backgrounds=backgrounds, dropout=dropout)
        self.ids_view = self._tokenize([caption.text for caption in named])
        self.camera = camera_embedding(cameras)
        self.azimuth = cameras.azimuth
        self.front = (cameras.azimuth.abs().rad2deg() < 45).nonzero()[:, 0]
        self.category, self.color = views.category, views.color
        self.second_color, self.pattern = views.second_color, views.pattern
        self.symmetry = azimuth_symmetry(views)
        self.latents = None

    def refresh(self, filling: int) -> None:
        """Replace the content by new objects and encode them with the same autoencoder."""
        self.fill(filling)
        if self.vae is not None:
            self.encode_with(self.vae)

    @torch.no_grad()
    def encode_with(self, vae: AutoencoderKL) -> None:
        """Encode every image over its own background: white for half of the images, a random gray for the others."""
        self.vae = vae
        codes = []
        for start in range(0, self.count, 1024):
            index = torch.arange(start, min(start + 1024, self.count), device=self.device)
            background = self.background[index, None, None, None].expand(-1, 3, 1, 1)
            image = composite(self.rgba_at(index), background)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                mean = vae.encode(2.0 * image - 1.0).latent_dist.mean
            codes.append((vae.config.scaling_factor * mean.float()).half())
        self.latents = torch.cat(codes)

    def random_index(self, count: int, generator: torch.Generator) -> Tensor:
        """Random indices of views, (count,)."""
        return torch.randint(0, self.count, (count,), generator=generator, device=self.device)

    def rgba_at(self, index: Tensor) -> Tensor:
        """Straight-alpha images (B, 4, H, W) in [0, 1] of the views at ``index``."""
        return self.rgba[index].movedim(-1, 1).float() / 255.0

    def random_rgba(self, count: int, generator: torch.Generator) -> Tensor:
        """Straight-alpha images (count, 4, H, W) in [0, 1] of random views."""
        return self.rgba_at(self.random_index(count, generator))

    def random_images(self, count: int, generator: torch.Generator) -> Tensor:
        """Images (count, 3, H, W) in [0, 1] of random views, each over its own background."""
        index = self.random_index(count, generator)
        return composite(self.rgba_at(index), self.background[index, None, None, None].expand(-1, 3, 1, 1))

    def targets_at(self, index: Tensor) -> Targets:
        """Targets of the probe for the views at ``index``."""
        return Targets(
            self.category[index],
            self.color[index],
            self.second_color[index],
            self.pattern[index],
            self.azimuth[index],
            self.symmetry[index],
        )

    def random_batch(self, count: int, generator: torch.Generator) -> DenoiserBatch:
        """Random training examples with random dropout of the conditioning.

        The camera is dropped for 20 % of the examples. Most of their captions name the view, and 60 % of them are front
        views, so that without a camera the prior behaves like a common text-to-image model with a bias towards front
        views. The caption alone is dropped for 10 % of the examples, which gives the unconditional prediction of
        classifier-free guidance; caption and camera are both dropped for 3 %.

        Raises:
            RuntimeError: The pool is not encoded.
        """
        if self.latents is None:
            raise RuntimeError("the pool has no latents; call encode_with first")
        device = self.device
        chance = torch.rand(5, count, generator=generator, device=device)
        index = self.random_index(count, generator)
        blind = chance[0] < 0.2
        front = self.front[torch.randint(0, len(self.front), (count,), generator=generator, device=device)]
        index = torch.where(blind & (chance[1] < 0.6), front, index)
        named_view = torch.where(blind, chance[2] < 0.8, chance[2] < 0.2)
        ids = torch.where(named_view[:, None], self.ids_view[index], self.ids_plain[index])
        ids = torch.where((chance[3] < 0.1)[:, None], self.empty_ids, ids)
        both = chance[4] < 0.03
        ids = torch.where(both[:, None], self.empty_ids, ids)
        camera = torch.where((blind | both)[:, None], torch.zeros_like(self.camera[index]), self.camera[index])
        return DenoiserBatch(self.latents[index].float(), ids.long(), camera)
