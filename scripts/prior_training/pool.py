"""The training data: a pool of captioned views of procedural objects, rendered on the training device."""

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
    """What the probe should read: class indices (B,), azimuth (B,) in radians, symmetry order (B,)."""

    category: Tensor
    color: Tensor
    second_color: Tensor
    pattern: Tensor
    azimuth: Tensor
    symmetry: Tensor


@dataclass(frozen=True)
class DenoiserBatch:
    """Latents (B, C, h, w), token ids (B, L), camera embedding (B, 16)."""

    latents: Tensor
    token_ids: Tensor
    camera: Tensor


def random_backgrounds(
    count: int, generator: torch.Generator, device: torch.device, *, white: float, gray: float
) -> Tensor:
    """(count, 3, 1, 1): white with probability ``white``, a random gray with ``gray``, else a random color."""
    kind = torch.rand(count, generator=generator, device=device)[:, None]
    value = torch.rand(count, 3, generator=generator, device=device)
    shade = 0.1 + 0.9 * value[:, :1].expand(-1, 3)
    color = torch.where(kind < white, torch.ones_like(value), torch.where(kind < white + gray, shade, value))
    return color[:, :, None, None]


def composite(rgba: Tensor, background: Tensor, opacity: Tensor | float = 1.0) -> Tensor:
    """(B, 3, H, W) in [0, 1] of straight-alpha (B, 4, H, W) over (B, 3, 1, 1)."""
    alpha = rgba[:, 3:] * opacity
    return rgba[:, :3] * alpha + background * (1 - alpha)


def training_cameras(count: int, size: int, generator: torch.Generator, device: torch.device) -> Cameras:
    """The prior's cameras: any azimuth; elevation -15..60 degrees mostly, up to the zenith for three in ten."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device=device)

    steep = torch.rand(count, generator=generator, device=device) < 0.3
    elevation = torch.where(steep, uniform(30.0, 90.0), uniform(-15.0, 60.0))
    distance = DISTANCE * uniform(0.95, 1.05)
    return orbit(uniform(0.0, 360.0), elevation, distance, torch.full_like(distance, FOVY_DEG), size, size)


class Pool:
    """Views of random objects: pictures (uint8 RGBA), captions as token ids, cameras, attributes, latents once encoded.

    Args:
        tokenizer: The prior's tokenizer.
        objects, views: Objects per filling and cameras per object.
        image_size: Pixels.
        antialias: Samples per pixel side.
        seed: Seed of the first filling; fillings differ.
        device: Where everything is rendered and kept.
        compile_: Compile the ray caster.
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
        """(len(texts), L) token ids on the device, as the tokenizer pads and truncates them.

        Every word of the grammar is one token, so each distinct word is looked up once: a hundred times faster than the
        tokenizer on a million captions. The first texts are compared with the tokenizer's own answer.
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
            raise RuntimeError("the tokenizer splits a word of the caption grammar: rebuild it from the lexicon")
        return ids.to(self.device)

    def fill(self, filling: int) -> None:
        """Render and caption new objects; latents are dropped until :meth:`encode_with`."""
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
        """Fill anew and encode with the same autoencoder."""
        self.fill(filling)
        if self.vae is not None:
            self.encode_with(self.vae)

    @torch.no_grad()
    def encode_with(self, vae: AutoencoderKL) -> None:
        """Encode every picture over its own background (white for half of them, a gray for the rest)."""
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
        return torch.randint(0, self.count, (count,), generator=generator, device=self.device)

    def rgba_at(self, index: Tensor) -> Tensor:
        """(B, 4, H, W) in [0, 1]."""
        return self.rgba[index].movedim(-1, 1).float() / 255.0

    def random_rgba(self, count: int, generator: torch.Generator) -> Tensor:
        return self.rgba_at(self.random_index(count, generator))

    def random_images(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3, H, W) in [0, 1], each over its own background."""
        index = self.random_index(count, generator)
        return composite(self.rgba_at(index), self.background[index, None, None, None].expand(-1, 3, 1, 1))

    def targets_at(self, index: Tensor) -> Targets:
        return Targets(
            self.category[index],
            self.color[index],
            self.second_color[index],
            self.pattern[index],
            self.azimuth[index],
            self.symmetry[index],
        )

    def random_batch(self, count: int, generator: torch.Generator) -> DenoiserBatch:
        """Training examples with conditioning dropped at random.

        A fifth of the cameras is dropped; those captions name the view and six in ten of them are front views, which
        makes the same weights an ordinary, front-loving text-to-image prior where no camera is given. A tenth of the
        captions is dropped with the camera kept (the unconditional branch of guidance), 3 % lose both.
        """
        if self.latents is None:
            raise RuntimeError("the pool has no latents yet: call encode_with first")
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
