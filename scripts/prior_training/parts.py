"""Parts of the pool: views of single objects, of scenes of two objects, and of signs and mugs with a word."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.priors.camera_embedding import camera_embedding
from scoredist3d.procedural import (
    DEFECTS,
    SCENE_SOLIDS,
    Dropout,
    Objects,
    azimuth_symmetry,
    captions_for,
    captions_for_scenes,
    cast_rays,
    degrade,
    degraded_caption,
    render_objects,
    sample_objects,
    sample_scenes,
    shade,
    view_words,
)
from scoredist3d.procedural.attributes import PATTERN_WEIGHTS, PLAIN
from scoredist3d.procedural.lettering import (
    captions_for_lettered,
    lettering_cameras,
    render_lettered,
    sample_lettered,
)

from .cameras import REFERENCE_EXTENT, training_cameras

RENDER_BLOCK = 256
_CHUNK_RAYS = 1 << 22
_DEFECT_SHARE = 0.08  # of the views of objects and scenes
_SECOND_DEFECT = 0.25  # of the degraded views
Tokenize = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Part:
    """``V`` views with captions and attributes; indices are those of :class:`~scoredist3d.procedural.Objects`.

    Attributes:
        rgba: (V, H, W, 4) uint8, straight alpha.
        background: (V,), gray value of each view's background; 1 for half of them.
        ids_plain, ids_view: (V, L), token ids of a caption without and with the view's name.
        camera: (V, 16), camera embeddings.
        azimuth: (V,), radians.
        symmetry: (V,), order of rotational symmetry; 0 if the azimuth is undefined.
        category, color, second_color, pattern: (V,), attributes of the first object; -1 for lettered objects.
        second_category: (V,), category of the second object; -1 if there is none.
        defects: (V, 2), indices of the defects that the caption names; -1 for none.
    """

    rgba: Tensor
    background: Tensor
    ids_plain: Tensor
    ids_view: Tensor
    camera: Tensor
    azimuth: Tensor
    symmetry: Tensor
    category: Tensor
    color: Tensor
    second_color: Tensor
    pattern: Tensor
    second_category: Tensor
    defects: Tensor

    def degraded(self, rgba: Tensor, background: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """The composite of the views at ``index``, with the defects that their captions name; (B, 3, H, W)."""
        image = degrade(rgba, background, self.defects[index, 0], generator)
        opaque = torch.cat([image, torch.ones_like(image[:, :1])], 1)
        return degrade(opaque, background, self.defects[index, 1], generator)


class Renderer:
    """Renders views as uint8 images.

    Args:
        image_size: Height and width in pixels.
        antialias: Rays per pixel along each axis.
        device: Device of the renders.
        compile_: Whether to compile the ray caster and the shader.
    """

    def __init__(self, image_size: int, antialias: int, device: torch.device, compile_: bool) -> None:
        self.image_size, self.antialias, self.device = image_size, antialias, device
        self.options: dict[str, Any] = {"antialias": antialias, "chunk_rays": _CHUNK_RAYS}
        if compile_:
            self.options["cast"] = torch.compile(partial(cast_rays, group=SCENE_SOLIDS), dynamic=False)
            self.options["shader"] = torch.compile(shade, dynamic=False)

    def __call__(self, items: Any, cameras: Cameras, render: Callable[..., Any] = render_objects) -> Tensor:
        """(V, H, W, 4) uint8 images of ``items``, rendered in blocks."""
        size = self.image_size
        images = torch.empty(len(items), size, size, 4, dtype=torch.uint8, device=self.device)
        for start in range(0, len(items), RENDER_BLOCK):
            part = slice(start, start + RENDER_BLOCK)
            images[part] = (255 * self.render(items[part], cameras[part], render).rgba).round().to(torch.uint8)
        return images

    def render(self, items: Any, cameras: Cameras, render: Callable[..., Any] = render_objects) -> Any:
        """The render of one block of items, with depths and normals if ``render`` is :func:`render_objects`."""
        return render(self._same_shape(items), cameras, **self.options)

    @staticmethod
    def _same_shape(items: Any) -> Any:
        """Items whose tables have the shape of scenes, so that the ray caster is compiled once."""
        if isinstance(items, Objects):
            return items.padded(SCENE_SOLIDS)
        return replace(items, objects=items.objects.padded(SCENE_SOLIDS))


def object_part(
    count: int,
    views: int,
    generator: torch.Generator,
    rng: random.Random,
    renderer: Renderer,
    tokenize: Tokenize,
    *,
    patterned: float = 0.0,
) -> Part:
    """``views`` views of each of ``count`` single objects; for ``patterned`` see :class:`.pool.PoolSizes`."""
    pattern = None
    if patterned:
        usual = torch.tensor(PATTERN_WEIGHTS, device=generator.device)
        equal = torch.ones_like(usual)
        equal[PLAIN] = 0.0
        weights = (1.0 - patterned) * usual / usual.sum() + patterned * equal / equal.sum()
        pattern = torch.multinomial(weights, count, replacement=True, generator=generator)
    objects = sample_objects(count, generator, renderer.device, pattern=pattern).repeat_interleave(views)
    cameras = training_cameras(len(objects), renderer.image_size, generator, renderer.device)
    return _part(
        objects,
        renderer(objects, cameras),
        cameras,
        lambda names, backgrounds, dropout: [
            caption.text
            for caption in captions_for(objects, rng, views=names, backgrounds=backgrounds, dropout=dropout)
        ],
        (generator, rng, tokenize),
        symmetry=azimuth_symmetry(objects),
        second=torch.full_like(objects.category, -1),
    )


def scene_part(
    count: int, views: int, generator: torch.Generator, rng: random.Random, renderer: Renderer, tokenize: Tokenize
) -> Part:
    """``views`` views of each of ``count`` scenes of two objects."""
    scenes = sample_scenes(count, generator, renderer.device).repeat_interleave(views)
    cameras = training_cameras(len(scenes), renderer.image_size, generator, renderer.device)
    return _part(
        scenes.objects,
        renderer(scenes.objects, cameras),
        cameras,
        lambda names, backgrounds, dropout: captions_for_scenes(
            scenes, rng, views=names, backgrounds=backgrounds, dropout=dropout
        ),
        (generator, rng, tokenize),
        symmetry=torch.zeros_like(scenes.objects.category),
        second=scenes.second.category,
    )


def _part(
    objects: Objects,
    rgba: Tensor,
    cameras: Cameras,
    caption: Callable[[Sequence[str | None] | None, Sequence[str | None], Dropout], list[str]],
    sources: tuple[torch.Generator, random.Random, Tokenize],
    *,
    symmetry: Tensor,
    second: Tensor,
) -> Part:
    """Views of objects or scenes, with two captions each; some are degraded, and their captions say so."""
    generator, rng, tokenize = sources
    count, device = len(objects), objects.device
    background = _gray_backgrounds(count, generator, device)
    words = ["white" if white else "gray" for white in (background == 1).tolist()]
    chance = torch.rand(2, count, generator=generator, device=device)
    drawn = torch.randint(0, len(DEFECTS), (2, count), generator=generator, device=device)
    first = torch.where(chance[0] < _DEFECT_SHARE, drawn[0], -1)
    # The interior of an object cannot be flattened after its composite has been degraded.
    twice = (first >= 0) & (chance[1] < _SECOND_DEFECT) & (drawn[1] != DEFECTS.index("low detail"))
    defects = torch.stack([first, torch.where(twice, drawn[1], -1)], 1)
    named = defects.tolist()

    def tokens(views: Sequence[str | None] | None, dropout: Dropout) -> Tensor:
        texts = caption(views, words, dropout)
        for k, pair in enumerate(named):
            if max(pair) >= 0:
                present = list(dict.fromkeys(DEFECTS[d] for d in pair if d >= 0))
                texts[k] = degraded_caption(texts[k], present, rng)
        return tokenize(texts)

    return Part(
        rgba=rgba,
        background=background,
        ids_plain=tokens(None, Dropout(empty=0.0)),
        ids_view=tokens(view_words(cameras), Dropout(empty=0.0, view=0.0)),
        camera=camera_embedding(cameras, REFERENCE_EXTENT),
        azimuth=cameras.azimuth,
        symmetry=symmetry,
        category=objects.category,
        color=objects.color,
        second_color=objects.second_color,
        pattern=objects.pattern,
        second_category=second,
        defects=defects,
    )


def lettered_part(
    count: int, views: int, generator: torch.Generator, rng: random.Random, renderer: Renderer, tokenize: Tokenize
) -> Part:
    """``views`` views of each of ``count`` signs and mugs with a word of the training words."""
    lettered = sample_lettered(count, generator, renderer.device).repeat_interleave(views)
    total = len(lettered)
    cameras = lettering_cameras(lettered, renderer.image_size, generator)
    ids = tokenize(captions_for_lettered(lettered, rng))
    none = torch.full((total,), -1, dtype=torch.int64, device=renderer.device)
    return Part(
        rgba=renderer(lettered, cameras, render_lettered),
        background=_gray_backgrounds(total, generator, renderer.device),
        ids_plain=ids,
        ids_view=ids,
        camera=camera_embedding(cameras, REFERENCE_EXTENT),
        azimuth=cameras.azimuth,
        symmetry=torch.ones_like(none),
        category=none,
        color=none,
        second_color=none,
        pattern=none,
        second_category=none,
        defects=torch.stack([none, none], 1),
    )


def _gray_backgrounds(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Gray values of backgrounds (count,): white for half of them, else uniform in [0.1, 1]."""
    white = torch.rand(count, generator=generator, device=device) < 0.5
    shade = 0.1 + 0.9 * torch.rand(count, generator=generator, device=device)
    return torch.where(white, 1.0, shade)
