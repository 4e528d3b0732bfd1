"""Members of a family with chosen proportions."""

from __future__ import annotations

import pytest
import torch

from scoredist3d.procedural import CATEGORIES, COLORS, SIZES, sample_objects
from scoredist3d.procedural.members import ObjectFamily, Proportions

CPU = torch.device("cpu")
RED = {"color": COLORS.index("red"), "second_color": COLORS.index("red"), "pattern": 0, "finish": 0}
COUNT = 6


def drawn(columns: int) -> torch.Tensor:
    """The fractions that the sampler draws for its objects with seed 5: those of the proportions, then the extent."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        torch.rand(COUNT, generator=generator)  # attributes
    for _ in range(2):
        torch.randn(COUNT, 4, generator=generator)  # jitter of the two colors
    extent = torch.rand(COUNT, generator=generator)
    return torch.stack([*(torch.rand(COUNT, generator=generator) for _ in range(columns - 1)), extent], 1)


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_sampled_objects_are_the_members_with_their_proportions(category: str) -> None:
    generator = torch.Generator().manual_seed(5)
    sampled = sample_objects(COUNT, generator, category=CATEGORIES.index(category), **RED)
    family = ObjectFamily(category, RED, CPU)
    members = family.build(Proportions(sampled.mode, sampled.size, drawn(family.dimensions)))
    torch.testing.assert_close(members.geometry, sampled.geometry, rtol=1e-5, atol=1e-5)
    for name in ("category", "color", "second_color", "pattern", "size", "mode", "finish"):
        assert torch.equal(getattr(members, name), getattr(sampled, name))
    assert torch.equal(members.surface[..., 6:], sampled.surface[..., 6:])
    assert (members.surface - sampled.surface).abs().max() < 0.25  # the jitter of the colors


def test_all_members_have_the_same_colors() -> None:
    family = ObjectFamily("mug", RED, CPU)
    mode, size = torch.tensor([0, 0, 0]), torch.tensor([0, 0, SIZES.index("tall")])
    members = family.build(Proportions(mode, size, torch.linspace(0.0, 1.0, 3 * family.dimensions).reshape(3, -1)))
    assert torch.equal(members.surface[0], members.surface[1]) and torch.equal(members.surface[0], members.surface[2])
    assert not torch.equal(members.geometry[0], members.geometry[1])


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="there is no family 'zeppelin'; choose one of mug"):
        ObjectFamily("zeppelin", RED, CPU)
