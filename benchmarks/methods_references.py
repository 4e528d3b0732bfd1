"""References of the benchmark ``methods.py``: real renders of a caption, and samples of the prior."""

from __future__ import annotations

import torch
from quickstart_quality import NUM_VIEWS, prior_size, ring
from torch import Tensor

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config.validation import parse_component
from scoredist3d.diffusion.samplers import sample
from scoredist3d.evaluation.measures import objects_of_caption, real_pictures
from scoredist3d.evaluation.true_objects import Stated
from scoredist3d.priors.conditioning import CFGConditions
from scoredist3d.procedural import CATEGORIES, COLORS, simple_caption

REFERENCES = ("real renders", "DDIM samples")
REAL_2D, REAL_3D = 256, 32  # real renders per prompt: images in 2D, objects with 8 views each in 3D
ELEVATION_2D = 20.0
DDIM_STEPS, DDIM_SCALE = 25, 3.0


def caption_of(prompt: str) -> tuple[str, str | None]:
    """(category, color or None) of the prompt "a COLOR CATEGORY" or "a CATEGORY".

    Raises:
        ValueError: The prompt has another form, or the procedural objects have no such category.
    """
    stated = Stated.of(prompt)
    if prompt not in (simple_caption(stated.category), simple_caption(stated.category, stated.color)):
        raise ValueError(f"prompt {prompt!r} must be 'a COLOR CATEGORY' or 'a CATEGORY', without pattern and finish")
    return stated.category, stated.color


def source_prompt(prompt: str) -> str:
    """Prompt of the source for editing methods: another color if the prompt names one, otherwise another category."""
    category, color = caption_of(prompt)
    if color is None:
        return simple_caption(CATEGORIES[(CATEGORIES.index(category) + 1) % len(CATEGORIES)])
    return simple_caption(category, COLORS[(COLORS.index(color) + 3) % len(COLORS)])


def held_back() -> Cameras:
    """The 8 held-out cameras for 3D assets, with azimuths between those of the previews."""
    azimuths = [22.5 + 45.0 * index for index in range(NUM_VIEWS)]
    return ring(azimuths, [5.0, 25.0, 40.0], prior_size(), torch.device("cpu"))


def front(count: int) -> Cameras:
    """The single view of the 2D recipes, ``count`` times."""
    return ring([0.0] * count, [ELEVATION_2D], prior_size(), torch.device("cpu"))


def real(dimension: str, prompt: str, seed: int) -> Tensor:
    """Real renders of the caption: first the reference set, then as many as a method makes, as a row of the table."""
    category, color = caption_of(prompt)
    if dimension == "2d":
        count = REAL_2D + seed
        objects = objects_of_caption(category, color, count)
        return real_pictures(objects, front(count), white=False)[:, None]
    count = REAL_3D + 1
    objects = objects_of_caption(category, color, count, seed=seed).repeat_interleave(NUM_VIEWS)
    views = torch.arange(NUM_VIEWS).repeat(count)
    return real_pictures(objects, held_back()[views], white=True).unflatten(0, (count, NUM_VIEWS))


@torch.no_grad()
def ddim(dimension: str, prompt: str, seed: int, device: torch.device) -> Tensor:
    """DDIM samples of the prior for the same cameras; different views show different objects."""
    block = {"type": "diffusers", "pretrained_model_name_or_path": "embedded"}
    prior = registry.build(parse_component("prior", block)).to(device)
    cameras = (front(seed) if dimension == "2d" else held_back()).to(device)
    count = len(cameras)
    conditions = CFGConditions(prior.embed([prompt] * count, cameras), prior.embed([""] * count, cameras))
    generator = torch.Generator().manual_seed(0 if dimension == "2d" else seed)
    latents = sample(prior, conditions, steps=DDIM_STEPS, scale=DDIM_SCALE, generator=generator)
    images = prior.decode(latents).clamp(0.0, 1.0)
    return images[:, None] if dimension == "2d" else images[None]
