"""Materials against hand-computed shading."""

import pytest
import torch

from scoredist3d import registry
from scoredist3d.cameras import orbit
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.materials import Light, Material, ShadingInputs

FEATURES = torch.tensor([[0.0, 2.0, -2.0]])
ALBEDO = torch.tensor([[0.5, 0.880797, 0.119203]])  # 1 / (1 + exp(-x))


def material(name: str, **options) -> Material:
    return registry.build(parse_component("material", {"type": name, **options}))


def cameras(count: int = 64):
    return orbit(
        torch.arange(count) * 5.0,
        torch.full((count,), 20.0),
        torch.full((count,), 3.0),
        torch.full((count,), 40.0),
        4,
        4,
    )


def light(ambient: float, diffuse: float, textureless: float = 0.0) -> Light:
    return Light(torch.tensor([[0.0, 0.0, 2.0]]), *(torch.tensor([value]) for value in (ambient, diffuse, textureless)))


@pytest.mark.parametrize("name", ["unlit", "diffuse"])
def test_unlit_colour_is_the_sigmoid_of_the_features(name):
    built = material(name)
    torch.testing.assert_close(built(ShadingInputs(FEATURES)), ALBEDO)
    torch.testing.assert_close(built.channels(ShadingInputs(FEATURES)).base_color, ALBEDO)
    assert built.parameter_groups() == []


def test_no_material_is_an_alias_of_unlit():
    assert type(material("no-material")) is type(material("unlit"))


def test_lambert_shading_by_hand():
    """A light at (0, 0, 2) above a point at (0, 0, 1) whose normal is 60 degrees away: n . l = 0.5."""
    normal = torch.tensor([[0.0, 3**0.5 / 2, 0.5]])
    point = torch.tensor([[0.0, 0.0, 1.0]])
    built = material("diffuse")
    shaded = built(ShadingInputs(FEATURES, normals=normal, points=point, light=light(0.1, 0.9)))
    torch.testing.assert_close(shaded, ALBEDO * (0.1 + 0.9 * 0.5))
    behind = built(ShadingInputs(FEATURES, normals=-normal, points=point, light=light(0.1, 0.9)))
    torch.testing.assert_close(behind, ALBEDO * 0.1)
    white = built(ShadingInputs(FEATURES, normals=normal, points=point, light=light(0.1, 0.9, textureless=1.0)))
    torch.testing.assert_close(white, torch.full((1, 3), 0.55))


def test_shading_without_normals_is_refused():
    with pytest.raises(ValueError, match="needs normals"):
        material("diffuse")(ShadingInputs(FEATURES, light=light(0.1, 0.9)))


def test_phases_follow_the_schedule():
    built = material("diffuse", ambient_only_steps=100, diffuse_probability=1.0, textureless_probability=0.0)
    generator = torch.Generator()
    assert built.sample_light(cameras(), 99, generator.manual_seed(0)) is None
    lit = built.sample_light(cameras(), 100, generator.manual_seed(0))
    assert (lit.ambient == 0.1).all() and (lit.diffuse == 0.9).all() and (lit.textureless == 0).all()
    shape_only = material("diffuse", ambient_only_steps=0, diffuse_probability=1.0, textureless_probability=1.0)
    assert (shape_only.sample_light(cameras(), 0, generator).textureless == 1).all()


def test_unlit_images_of_a_lit_step_keep_their_colour():
    built = material("diffuse", ambient_only_steps=0, diffuse_probability=0.5, textureless_probability=1.0)
    drawn = built.sample_light(cameras(), 0, torch.Generator().manual_seed(0))
    lit = drawn.diffuse > 0
    assert 0 < lit.sum() < len(lit)  # 64 fair draws
    assert (drawn.ambient[~lit] == 1).all() and (drawn.textureless[~lit] == 0).all()
    assert (drawn.textureless[lit] == 1).all()


def test_light_is_drawn_near_the_camera_from_the_given_generator_only():
    built = material("diffuse", ambient_only_steps=0)
    state = torch.random.get_rng_state()
    first = built.sample_light(cameras(), 0, torch.Generator().manual_seed(1))
    again = built.sample_light(cameras(), 0, torch.Generator().manual_seed(1))
    other = built.sample_light(cameras(), 0, torch.Generator().manual_seed(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.position, again.position) and not torch.equal(first.position, other.position)
    distance = first.position.norm(dim=-1) / 3.0
    assert distance.min() >= 0.8 - 1e-5 and distance.max() <= 1.5 + 1e-5
    still = material("diffuse", ambient_only_steps=0, light_spread=0.0, light_distance_range=[1.0, 1.0])
    drawn = still.sample_light(cameras(), 0, torch.Generator())
    torch.testing.assert_close(drawn.position, cameras().origins)


def test_evaluation_is_not_random():
    assert material("diffuse").sample_light(cameras(), 5000, None) is None
    headlight = material("diffuse", evaluation="diffuse").sample_light(cameras(), 5000, None)
    assert torch.equal(headlight.position, cameras().origins) and (headlight.textureless == 0).all()


def test_evaluation_can_show_the_shape_alone():
    headlight = material("diffuse", evaluation="textureless").sample_light(cameras(), 0, None)
    assert (headlight.textureless == 1).all() and (headlight.diffuse == 0.9).all()


def test_soft_shading_draws_the_share_of_the_point_light():
    options = {"ambient_only_steps": 0, "diffuse_probability": 1.0}
    soft = material("diffuse", soft_shading=True, **options)
    drawn = soft.sample_light(cameras(500), 0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.ambient + drawn.diffuse, torch.ones(500))
    assert drawn.diffuse.min() < 0.05 and drawn.diffuse.max() > 0.95 and abs(drawn.diffuse.mean() - 0.5) < 0.07
    half = material("diffuse", soft_shading=True, **(options | {"diffuse_probability": 0.5}))
    drawn = half.sample_light(cameras(500), 0, torch.Generator().manual_seed(0))
    assert (drawn.ambient[drawn.diffuse == 0] == 1).all() and 150 < (drawn.diffuse == 0).sum() < 350


def test_hard_shading_draws_what_it_always_drew():
    """Soft shading draws after the position and the modes, so it does not change them."""
    built = [material("diffuse", soft_shading=soft, ambient_only_steps=0) for soft in (False, True)]
    first, second = (m.sample_light(cameras(), 0, torch.Generator().manual_seed(1)) for m in built)
    assert torch.equal(first.position, second.position) and torch.equal(first.textureless, second.textureless)


def test_lights_of_points_are_those_of_their_images():
    drawn = material("diffuse", ambient_only_steps=0).sample_light(cameras(4), 0, torch.Generator().manual_seed(1))
    index = torch.tensor([3, 0, 3])
    picked = drawn[index]
    assert torch.equal(picked.position, drawn.position[index]) and picked.rotation is None
    turned = Light(drawn.position, drawn.ambient, drawn.diffuse, drawn.textureless, rotation=torch.arange(4.0))
    assert turned[index].rotation.tolist() == [3.0, 0.0, 3.0]


def test_too_much_light_is_refused():
    with pytest.raises(ConfigError, match="ambient: ambient \\+ diffuse must be at most 1"):
        material("diffuse", ambient=0.5, diffuse=0.9)
    with pytest.raises(ConfigError, match="light_distance_range: the first value"):
        material("diffuse", light_distance_range=[2.0, 1.0])
