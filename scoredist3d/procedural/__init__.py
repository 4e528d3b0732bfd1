"""Procedural 3D objects with captions and exact geometry: training and benchmark data for the embedded prior.

Objects are unions of clipped quadrics, some of them hollow, from 53 families. A closed-form ray caster in plain PyTorch
renders them. Everything is batched over N objects and runs on any device.

    generator = torch.Generator(device).manual_seed(0)
    objects = sample_objects(256, generator, device)              # attributes balanced and independent
    image = render_objects(objects, cameras)                      # one camera per object
    rgb = image.over(torch.ones(3))                               # (N, H, W, 3)
    captions = captions_for(objects, random.Random(0), views=view_words(cameras))

The world's z axis points up and the front of every object faces +x. Objects fill most of the unit ball.
"""

from scoredist3d.procedural.attributes import (
    AZIMUTH_SYMMETRY,
    CATEGORIES,
    COLOR_VALUES,
    COLORS,
    FINISHES,
    MODES,
    PATTERNS,
    SIZES,
)
from scoredist3d.procedural.captions import (
    DEFECTS,
    Caption,
    Dropout,
    caption,
    captions_for,
    degraded_caption,
    simple_caption,
    view_words,
)
from scoredist3d.procedural.defects import degrade
from scoredist3d.procedural.lexicon import lexicon
from scoredist3d.procedural.objects import Objects, azimuth_symmetry, sample_objects
from scoredist3d.procedural.primitives import NUM_HOLES, NUM_SOLIDS, Hits, cast_rays, occupancy
from scoredist3d.procedural.rendering import DEFAULT_LIGHT, ShapeRender, render_objects
from scoredist3d.procedural.scene_captions import captions_for_scenes, scene_caption
from scoredist3d.procedural.scenes import RELATIONS, SCENE_SOLIDS, Scenes, sample_scenes
from scoredist3d.procedural.shading import shade
from scoredist3d.procedural.tokenizer import build_tokenizer

__all__ = [
    "AZIMUTH_SYMMETRY",
    "CATEGORIES",
    "COLORS",
    "COLOR_VALUES",
    "DEFAULT_LIGHT",
    "DEFECTS",
    "FINISHES",
    "MODES",
    "NUM_HOLES",
    "NUM_SOLIDS",
    "PATTERNS",
    "RELATIONS",
    "SCENE_SOLIDS",
    "SIZES",
    "Caption",
    "Dropout",
    "Hits",
    "Objects",
    "Scenes",
    "ShapeRender",
    "azimuth_symmetry",
    "build_tokenizer",
    "caption",
    "captions_for",
    "captions_for_scenes",
    "cast_rays",
    "degrade",
    "degraded_caption",
    "lexicon",
    "occupancy",
    "render_objects",
    "sample_objects",
    "sample_scenes",
    "scene_caption",
    "shade",
    "simple_caption",
    "view_words",
]
