"""Signs and mugs that carry short words: objects, renders and captions.

generator = torch.Generator(device).manual_seed(0)
lettered = sample_lettered(256, generator)                    # words of the training split
cameras = lettering_cameras(lettered, 128, generator)         # one camera per object, near the front
image = render_lettered(lettered, cameras)                    # ShapeRender
captions = captions_for_lettered(lettered, random.Random(0))  # "a red sign that says a b 1 2"
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from scoredist3d.cameras import Cameras, orbit
from scoredist3d.procedural.attributes import CATEGORIES, COLOR_VALUES, COLORS, PLAIN
from scoredist3d.procedural.batch import Batch
from scoredist3d.procedural.builder import Builder, fit
from scoredist3d.procedural.captions import with_article
from scoredist3d.procedural.families.kitchen import mug_handle
from scoredist3d.procedural.fonts import FONTS, layout_text
from scoredist3d.procedural.objects import Objects, sample_objects
from scoredist3d.procedural.primitives import Hits, cast_rays
from scoredist3d.procedural.rendering import STANDARD_DISTANCE, STANDARD_FOVY_DEG, ShapeRender, render_objects
from scoredist3d.procedural.shading import shade
from scoredist3d.procedural.words import random_word, spelled

KINDS = ("sign", "mug")
SIGN, MUG = range(len(KINDS))
AZIMUTH_DEG = (35.0, 15.0)
"""Largest absolute azimuth of the cameras for each kind; the word on a mug bends away from the front."""

_INKED = 0  # row of the primitive that carries the word
_MIN_CONTRAST = 0.38  # difference of luminance between ink and surface
_JITTER = 0.04  # standard deviation of the colors
_EXTENT = (0.92, 0.99)  # range of the distance of the farthest point from the center
_MUG_ARC = math.radians(42.0)  # largest azimuth on a mug that the word reaches
_MUG_HEIGHT = 0.62  # largest height of letters, as a fraction of the mug's
_MAX_STRETCH = (1.3, 1.6)  # largest ratio of the vertical to the horizontal scale of letters on each kind
_MAX_MUG_WIDTH = 3.7  # in cap heights; wider words on mugs are set in the condensed font
_CONDENSED = [font.name for font in FONTS].index("condensed")
_LUMINANCE = (0.2126, 0.7152, 0.0722)
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 22


@dataclass(frozen=True)
class Lettered(Batch):
    """``N`` objects that carry a word.

    Attributes:
        objects: The objects. The first row of their tables is the primitive that carries the word. Signs belong to no
            family of objects; their category is -1. The mode of a sign is its number of posts minus one.
        words: The N words, in upper case.
        kind: (N,) int64, index into KINDS.
        font: (N,) int64, index into FONTS.
        ink: (N,) int64, color of the letters, index into COLORS.
        ink_color: (N, 3), sRGB of the ink.
        fill: (N,), size of the word as a fraction of the largest possible size.
    """

    objects: Objects
    words: tuple[str, ...]
    kind: Tensor
    font: Tensor
    ink: Tensor
    ink_color: Tensor
    fill: Tensor

    def __len__(self) -> int:
        return len(self.words)

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.kind.device

    def __getitem__(self, index: int | slice | Tensor) -> Self:
        """Select objects; the result keeps its batch dimension."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        positions = torch.arange(len(self))[index if isinstance(index, slice) else index.cpu()].tolist()
        return replace(super().__getitem__(index), words=tuple(self.words[k] for k in positions))

    def repeat_interleave(self, repeats: int) -> Self:
        """Repeat each object ``repeats`` times in a row, once for each of its views."""
        words = tuple(word for word in self.words for _ in range(repeats))
        return replace(super().repeat_interleave(repeats), words=words)


def sample_lettered(
    count: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    *,
    held_out: bool = False,
    words: Sequence[str] | None = None,
    kind: int | None = None,
    font: int | None = None,
) -> Lettered:
    """Generate random signs and mugs with words.

    Kinds, colors and fonts are balanced. The color of the letters contrasts with that of the object.

    Args:
        count: Number of objects.
        generator: Source of all randomness; the objects are made on its device.
        device: Device of the result; by default that of the generator.
        held_out: Whether the words are held-out words instead of training words.
        words: Fixed words, one for each object; by default random ones.
        kind: Fixed index into KINDS.
        font: Fixed index into FONTS.

    Raises:
        ValueError: The number of words differs from ``count``, or a word has characters that no font has.
    """
    source = generator.device
    seed = int(torch.randint(1 << 62, (1,), generator=generator, device=source))
    if words is None:
        rng = random.Random(seed)
        words = [random_word(rng, held_out=held_out) for _ in range(count)]
    if len(words) != count:
        raise ValueError(f"words: there must be one word for each of the {count} objects, got {len(words)}")

    def index(bound: int, fixed: int | None) -> Tensor:
        drawn = torch.randint(bound, (count,), generator=generator, device=source)
        return drawn if fixed is None else torch.full_like(drawn, fixed)

    kinds, fonts = index(len(KINDS), kind), index(len(FONTS), font)
    base = sample_objects(count, generator, category=CATEGORIES.index("mug"), pattern=PLAIN, size=0, finish=0)
    ink = _contrasting(base.color, generator)
    layout = layout_text(words, fonts, source)
    if font is None:
        fonts = torch.where((kinds == MUG) & (layout.width > _MAX_MUG_WIDTH), _CONDENSED, fonts)
        layout = layout_text(words, fonts, source)
    geometry, surface = _build(base, kinds, layout.width, generator)
    objects = replace(base, geometry=geometry, surface=surface, category=torch.where(kinds == MUG, base.category, -1))
    fill = 0.86 + 0.14 * torch.rand(count, generator=generator, device=source)
    upper = tuple(word.upper() for word in words)
    lettered = Lettered(objects, upper, kinds, fonts, ink, _jittered(ink, generator), fill)
    return lettered if device is None else lettered.to(device)


def lettering_cameras(lettered: Lettered, size: int, generator: torch.Generator) -> Cameras:
    """One random camera near the front of each object, for square images of ``size`` pixels.

    The azimuth is uniform within ``AZIMUTH_DEG`` of the kind, the elevation uniform in [-5, 35] degrees.
    """
    count, device = len(lettered), lettered.device
    unit = torch.rand(2, count, generator=generator, device=generator.device).to(device)
    azimuth = torch.tensor(AZIMUTH_DEG, device=device)[lettered.kind] * (2 * unit[0] - 1)
    distance, fovy = (torch.full_like(azimuth, v) for v in (STANDARD_DISTANCE, STANDARD_FOVY_DEG))
    return orbit(azimuth, 40.0 * unit[1] - 5.0, distance, fovy, size, size)


def render_lettered(
    lettered: Lettered,
    cameras: Cameras,
    *,
    antialias: int = 2,
    light: Tensor | None = None,
    chunk_rays: int | None = None,
    cast: Callable[..., Hits] = cast_rays,
    shader: Callable[..., Tensor] = shade,
) -> ShapeRender:
    """Render object i with its word with camera i; see :func:`render_objects` for the arguments.

    Raises:
        ValueError: The numbers of objects and cameras differ.
    """
    if len(lettered) != len(cameras):
        raise ValueError(f"cameras: {len(lettered)} objects need one camera each, got {len(cameras)}")
    rays = cameras.height * cameras.width * antialias**2
    if chunk_rays is None:
        chunk_rays = _CPU_CHUNK if lettered.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, chunk_rays // rays)
    parts = []
    for start in range(0, len(lettered), step):
        chunk = slice(start, start + step)
        part = lettered[chunk]
        parts.append(
            render_objects(
                part.objects,
                cameras[chunk],
                antialias=antialias,
                light=None if light is None else light[chunk],
                chunk_rays=step * rays,  # the shader serves one chunk
                cast=cast,
                shader=_ink_shader(part, shader),
            )
        )
    return ShapeRender(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(ShapeRender)))


def captions_for_lettered(
    lettered: Lettered, rng: random.Random, *, views: Sequence[str | None] | None = None
) -> list[str]:
    """One random caption for each object, with the word spelled: "a red sign that says a b 1 2".

    The color of the object is left out for 30 % of the captions. 20 % state the color of the letters, and 10 % the
    posts of a sign.

    Args:
        lettered: N objects.
        rng: Source of all randomness.
        views: View word of each image, which half of the captions state; None if it must not be stated.

    Raises:
        ValueError: ``views`` differs in length from ``lettered``.
    """
    views = views if views is not None else [None] * len(lettered)
    if len(views) != len(lettered):
        raise ValueError(f"views: there must be one word for each of the {len(lettered)} objects, got {len(views)}")
    columns = [t.tolist() for t in (lettered.kind, lettered.objects.color, lettered.objects.mode, lettered.ink)]
    captions = []
    for word, view, kind, color, mode, ink in zip(lettered.words, views, *columns, strict=True):
        noun = "sign" if kind == SIGN else rng.choices(("mug", "cup"), (0.8, 0.2))[0]
        if rng.random() >= 0.3:
            noun = f"{COLORS[color]} {noun}"
        if kind == SIGN and rng.random() < 0.1:
            noun = f"{noun} on {('one post', 'two posts')[mode]}"
        says = rng.choices(("that says", "with the word", "that reads"), (0.55, 0.35, 0.1))[0]
        text = f"{with_article(noun)} {says} {spelled(word)}"
        if rng.random() < 0.2:
            text = f"{text} in {COLORS[ink]} letters"
        if view is not None and rng.random() < 0.5:
            text = f"{text}, {view} view"
        captions.append(text)
    return captions


# -- objects ---------------------------------------------------------------------------------------------------------


def _contrasting(color: Tensor, generator: torch.Generator) -> Tensor:
    """Random ink colors that contrast with surface colors (N,); black and white are three times as likely."""
    values = torch.tensor(COLOR_VALUES, device=color.device) @ torch.tensor(_LUMINANCE, device=color.device)
    weights = ((values[:, None] - values[None, :]).abs() > _MIN_CONTRAST).float()
    for name in ("black", "white"):
        weights[:, COLORS.index(name)] *= 3.0
    return torch.multinomial(weights[color], 1, generator=generator)[:, 0]


def _jittered(color: Tensor, generator: torch.Generator) -> Tensor:
    """sRGB values (N, 3) of color indices (N,), with jitter."""
    noise = torch.randn(len(color), 3, generator=generator, device=color.device)
    return (torch.tensor(COLOR_VALUES, device=color.device)[color] + _JITTER * noise).clamp(0.0, 1.0)


def _build(base: Objects, kinds: Tensor, width: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Geometry and surface tables of all objects.

    Args:
        base: Mugs whose colors and modes the objects take over.
        kinds: (N,), index into KINDS.
        width: (N,), width of the words in cap heights.
        generator: Source of the proportions.
    """
    geometry, surface = torch.empty_like(base.geometry), torch.empty_like(base.surface)
    first = _jittered(base.color, generator)
    two_tone = base.color != base.second_color
    second = torch.where(two_tone[:, None], _jittered(base.second_color, generator), first)
    extent = _EXTENT[0] + (_EXTENT[1] - _EXTENT[0]) * torch.rand(len(kinds), generator=generator, device=kinds.device)
    for kind in range(len(KINDS)):
        chosen = (kinds == kind).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        pattern = torch.zeros_like(chosen)
        builder = Builder(base.mode[chosen], first[chosen], second[chosen], pattern, two_tone[chosen], generator)
        if kind == SIGN:
            _sign(builder, width[chosen])
        else:
            _mug(builder)
        built, surface[chosen] = builder.tables()
        factors = torch.ones(len(chosen), 3, device=kinds.device)
        geometry[chosen] = fit(built, builder.num_pieces, factors, extent[chosen])
    return geometry, surface


def _sign(b: Builder, width: Tensor) -> None:
    """A board in front of one post or two posts; two-colored signs have a border. Lengths are in cap heights."""
    half_width = width / 2 + b.uniform(0.25, 0.4)
    # Boards of long words are higher, for letters that are stretched.
    half_height = b.uniform(0.8, 0.95) * (1 + 0.1 * (width - 1.5).clamp_min(0))
    thick = 0.05 * half_width + 0.03
    post, below = 0.045 * half_width + 0.05, b.uniform(0.35, 0.6) * half_width
    b.box((0, 0, 0), (thick, half_width, half_height), paint=b.plain)
    edge = 0.09
    framed = b.main.first.ne(b.second.first).any(-1)
    b.box((-0.5 * thick, 0, 0), (thick, half_width + edge, half_height + edge), paint=b.second, on=framed)
    wood = b.second_or(0.50, 0.33, 0.18)
    center, half = -below / 2, half_height + below / 2 - 0.1
    behind = -thick * 1.4 - post
    one = b.mode == 0
    b.box((behind, b.select(one, 0.0, -0.62 * half_width), center), (post, post, half), paint=wood)
    b.box((behind, 0.62 * half_width, center), (post, post, half), paint=wood, on=~one)


def _mug(b: Builder) -> None:
    """A wide cup open at the top; the handle, round or square, is on the right (+y)."""
    radius, half, top = b.uniform(0.62, 0.68), b.uniform(0.52, 0.62), b.uniform(0.98, 1.04)
    cavity = b.round_piece((0, 0, 0.1), radius * 0.88, half, top=top, paint=b.plain)
    b.round((0, 0, 0), radius, half, top=top, hole=cavity, paint=b.plain)
    outer, thick = b.uniform(0.30, 0.37), b.uniform(0.08, 0.10)
    mug_handle(b, radius * 0.94, outer, thick)


# -- ink -------------------------------------------------------------------------------------------------------------


def _ink_shader(lettered: Lettered, shader: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Shader of :func:`render_objects` that draws the words on the objects."""
    layout = layout_text(lettered.words, lettered.font, lettered.device)
    half = 1.0 / lettered.objects.geometry[:, _INKED, 0:9].unflatten(-1, (3, 3)).norm(dim=-1)
    scale = _letter_scale(lettered, half, layout.width)
    mug = (lettered.kind == MUG)[:, None]

    def inked(surface: Tensor, geometry: Tensor, hits: Hits, light: Tensor, directions: Tensor) -> Tensor:
        x, y, z = hits.local.unbind(-1)
        u = torch.where(mug, torch.atan2(y, x) * half[:, 0:1], y * half[:, 1:2])
        normal = hits.local_normal
        outside = torch.where(mug, normal[..., 2].abs() < 0.5, normal[..., 0] > 0.9)
        carries = outside & (hits.primitive == _INKED) & torch.isfinite(hits.t)
        ink = layout.coverage(u / scale[:, 0:1], z * half[:, 2:3] / scale[:, 1:2]) * carries
        return shader(surface, geometry, hits, light, directions, ink=(ink, lettered.ink_color))

    return inked


def _letter_scale(lettered: Lettered, half: Tensor, width: Tensor) -> Tensor:
    """Horizontal and vertical scale of the letters, (N, 2), in scene units per cap height.

    Args:
        lettered: N objects.
        half: (N, 3), half-sizes of the inked primitive; for a mug, the first one is its radius.
        width: (N,), width of the words in cap heights.
    """
    mug = lettered.kind == MUG
    wide = torch.where(mug, 2 * _MUG_ARC * half[:, 0], 1.86 * half[:, 1])
    high = torch.where(mug, 2 * _MUG_HEIGHT * half[:, 2], 1.4 * half[:, 2])
    stretch = torch.tensor(_MAX_STRETCH, device=width.device)[lettered.kind]
    horizontal = torch.minimum(wide / width, high)
    scale = torch.stack([horizontal, torch.minimum(stretch * horizontal, high)], -1)
    return scale * lettered.fill[:, None]
