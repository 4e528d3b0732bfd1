"""Physically based shading against closed forms and integrals of the rendering equation."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from scoredist3d import registry
from scoredist3d.cameras import orbit
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.materials import ShadingInputs
from scoredist3d.materials.lighting import EnvironmentLight, studio_panorama, to_environment_frame
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.ops.shading.color import linear_to_srgb, srgb_to_linear
from scoredist3d.ops.shading.environment import texel_directions


def pbr(panorama: torch.Tensor | None = None, **options):
    """The material, with an optional panorama in place of its own."""
    built = registry.build(parse_component("material", {"type": "pbr", **options}))
    if panorama is not None:
        built.environment = EnvironmentLight(
            panorama, levels=built.config.environment_levels, learned=built.config.learned
        )
    return built


def views(count: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random normals, and view directions that see their front."""
    generator = torch.Generator().manual_seed(seed)
    normals, dirs = (F.normalize(torch.randn(count, 3, generator=generator), dim=-1) for _ in range(2))
    return normals, torch.where((normals * dirs).sum(-1, keepdim=True) > 0, -dirs, dirs)


def shaded(built, albedo: float, roughness: float, metallic: float, count: int = 64) -> torch.Tensor:
    normals, dirs = views(count)
    full = torch.full((count,), 1.0)
    return built.reflected(full[:, None].expand(-1, 3) * albedo, full * roughness, full * metallic, normals, dirs)


def gradient(directions: torch.Tensor) -> torch.Tensor:
    """Smooth test light: (..., 3) radiance from (..., 3) directions."""
    x, y, z = directions.unbind(-1)
    return torch.stack([1 + 0.6 * z, 1 + 0.4 * x - 0.3 * z, 0.7 + 0.5 * x * y + 0.2 * y], dim=-1)


SMOOTH = gradient(texel_directions(64, 128))
UNIFORM = torch.full((64, 128, 3), 1.0)


@pytest.mark.parametrize("metallic", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("roughness", [0.08, 0.4, 1.0])
def test_white_furnace(metallic, roughness):
    """Under uniform light, a white surface is as bright as the light, and a darker one is darker."""
    built = pbr(UNIFORM)
    white = shaded(built, 1.0, roughness, metallic)
    assert white.max() <= 1 + 1e-4
    torch.testing.assert_close(white, torch.ones_like(white), atol=1e-3, rtol=0)
    for albedo in (0.0, 0.3, 0.9):
        assert (shaded(built, albedo, roughness, metallic) <= white + 1e-5).all()


def test_single_scattering_loses_the_light_that_bounces_twice():
    rough = shaded(pbr(UNIFORM, multiple_scattering=False), 1.0, 1.0, 1.0)
    assert rough.min() > 0.3 and rough.max() < 0.99 and rough.mean() < 0.7
    smooth = shaded(pbr(UNIFORM, multiple_scattering=False), 1.0, 0.08, 1.0)
    assert smooth.min() > 0.9 and smooth.max() <= 1 + 1e-4


def reference(normal: torch.Tensor, view: torch.Tensor, roughness: float, f0: float) -> torch.Tensor:
    """(3,) int L(l) D G F / (4 n.v n.l) (n.l) dl in float64 over 250,000 half vectors, stratified, drawn from D."""
    alpha, count = roughness**2, 500
    normal, view = normal.double(), view.double()
    tangent = F.normalize(torch.linalg.cross(normal, torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)), dim=0)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    c_half = ((1 - u) / (1 + (alpha**2 - 1) * u)).sqrt()[:, None].expand(count, count)
    phi, s_half = (2 * math.pi * u)[None, :], (1 - c_half**2).sqrt()
    local = torch.stack([s_half * phi.cos(), s_half * phi.sin(), c_half], -1)
    half = local @ torch.stack([tangent, torch.linalg.cross(normal, tangent), normal])
    facing = half @ view
    light = 2 * facing[..., None] * half - view
    c_light, c_view = light @ normal, normal @ view
    valid = (c_light > 0) & (facing > 0)
    c_safe = torch.where(valid, c_light, 1.0)
    masking = [c * (alpha**2 + (1 - alpha**2) * o**2).sqrt() for c, o in ((c_safe, c_view), (c_view, c_safe))]
    fresnel = f0 + (1 - f0) * (1 - facing).clamp(0, 1) ** 5
    weight = torch.where(valid, fresnel * 0.5 / sum(masking) * c_safe * 4 * facing / c_half, 0.0)
    return (gradient(light) * weight[..., None]).mean((0, 1))


# (roughness, cosine of the view angle) -> relative error allowed for the split-sum approximation, under light
# that varies by half of its mean. It is exact at normal incidence and worst at grazing angles.
ERRORS = {
    (0.15, 0.999): 2e-3,
    (0.5, 0.999): 4e-3,
    (0.9, 0.999): 4e-3,
    (0.15, 0.3): 0.01,
    (0.3, 0.5): 0.02,
    (0.5, 0.9): 0.02,
    (0.5, 0.5): 0.06,
    (0.5, 0.3): 0.13,
    (0.9, 0.9): 0.02,
    (0.9, 0.4): 0.05,
}


@pytest.mark.parametrize(("roughness", "cosine"), ERRORS)
def test_glossy_light_against_the_rendering_equation(roughness, cosine):
    normal = F.normalize(torch.tensor([0.4, -0.2, 0.7]), dim=0)
    side = F.normalize(torch.linalg.cross(normal, torch.tensor([0.1, 0.9, 0.2])), dim=0)
    built, one = pbr(SMOOTH, multiple_scattering=False), torch.ones(1)
    for sign in (1.0, -1.0):
        view = cosine * normal + sign * math.sqrt(1 - cosine**2) * side
        for f0 in (1.0, 0.3):
            color = built.reflected(f0 * torch.ones(1, 3), one * roughness, one, normal[None], -view[None])[0]
            scale, bias = built.environment.reflectance(one * cosine, one * roughness)
            error = (color - reference(normal, view, roughness, f0).float()) / (f0 * scale + bias)
            assert error.abs().max() < ERRORS[roughness, cosine]


def test_diffuse_light_is_the_irradiance():
    """The diffuse term of a non-metal is albedo * E / pi times the share of light not reflected, with E known."""
    normals, dirs = views(40)
    built = pbr(SMOOTH)
    half, rough = torch.full((40, 3), 0.5), torch.ones(40)
    bright, dark = (built.reflected(a, rough, 0 * rough, normals, dirs) for a in (half, 0 * half))
    scale, bias = built.environment.reflectance(-(normals * dirs).sum(-1), rough)
    inside = 1 - built._glossy(torch.full((40, 1), 0.04), scale[:, None], bias[:, None])
    x, y, z = normals.unbind(-1)
    irradiance = torch.stack([1 + 0.4 * z, 1 + 0.8 / 3 * x - 0.2 * z, 0.7 + 0.125 * x * y + 0.4 / 3 * y], dim=-1)
    torch.testing.assert_close(bright - dark, 0.5 * inside * irradiance, atol=2e-3, rtol=0)


def test_a_mirror_shows_what_is_in_the_mirrored_direction():
    normals, dirs = views(200)
    count = torch.ones(200)
    color = pbr(SMOOTH).reflected(torch.ones(200, 3), 0 * count, count, normals, dirs)
    mirrored = dirs - 2 * (dirs * normals).sum(-1, keepdim=True) * normals
    torch.testing.assert_close(color, gradient(mirrored), atol=5e-3, rtol=0)


def test_the_light_turns_with_its_rotation():
    """Rotating the light by 90 degrees equals rotating object and camera by -90 degrees."""
    normals, dirs = views(50)
    quarter = torch.full((50,), math.pi / 2)
    features = torch.zeros(50, 5)
    inputs = ShadingInputs(features, normals=normals, view_dirs=dirs)
    rotated_back = replace(
        inputs, normals=to_environment_frame(normals, quarter), view_dirs=to_environment_frame(dirs, quarter)
    )
    cameras = orbit(*(torch.ones(2) * v for v in (0.0, 20.0, 3.0, 40.0)), 4, 4)
    light = pbr(random_rotation=True).sample_light(cameras, 0, torch.Generator().manual_seed(0))
    index = torch.zeros(50, dtype=torch.long)
    light = light[index]
    plain = pbr()
    expected = plain(rotated_back)
    torch.testing.assert_close(pbr(rotation=90.0)(inputs), expected, atol=1e-5, rtol=0)
    lit = replace(inputs, light=replace(light, rotation=quarter))
    torch.testing.assert_close(plain(lit), expected, atol=1e-5, rtol=0)
    # +x rotated by 90 degrees is +y.
    torch.testing.assert_close(
        to_environment_frame(torch.tensor([[0.0, 1, 0]]), math.pi / 2), torch.tensor([[1.0, 0, 0]])
    )


def test_random_rotation_is_of_training_images_and_of_the_given_generator():
    cameras = orbit(*(torch.ones(64) * v for v in (0.0, 20.0, 3.0, 40.0)), 4, 4)
    state = torch.random.get_rng_state()
    built = pbr(random_rotation=True)
    first, again = (built.sample_light(cameras, 3, torch.Generator().manual_seed(5)).rotation for _ in range(2))
    assert torch.equal(first, again) and torch.equal(state, torch.random.get_rng_state())
    assert first.min() < 0.5 and 5.8 < first.max() <= 2 * math.pi
    assert built.sample_light(cameras, 3, None) is None
    assert pbr().sample_light(cameras, 3, torch.Generator()) is None


def test_colour_is_the_display_curve_of_the_clamped_radiance():
    normals, dirs = views(30)
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    built = pbr(UNIFORM, intensity=1.3)
    found = built.channels(ShadingInputs(features))
    radiance = built.reflected(srgb_to_linear(found.base_color), found.roughness, found.metallic, normals, dirs)
    expected = linear_to_srgb(radiance.clamp(0, 1))
    torch.testing.assert_close(built(ShadingInputs(features, normals=normals, view_dirs=dirs)), expected)
    # A white diffuse surface under radiance 1 is white; linear albedo 0.5 is display gray 0.735.
    gray = linear_to_srgb(shaded(pbr(UNIFORM), 0.5, 1.0, 0.0)).mean().item()
    assert gray == pytest.approx(0.735, abs=0.02)


def test_features_of_channels():
    built = pbr(normal_strength=0.3)
    count = torch.linspace(0.1, 0.9, 20)
    channels = SurfaceChannels(torch.stack([count, 1 - count, 0.5 + 0 * count], -1), count, 0.9 * count)
    features = built.features_of(channels)
    assert features.shape == (20, built.num_features)
    again = built.channels(ShadingInputs(features, normals=views(20)[0]))
    torch.testing.assert_close(again.base_color, channels.base_color, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.roughness, channels.roughness, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.metallic, channels.metallic, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.normal, views(20)[0])  # no offset
    plain = built.channels(ShadingInputs(built.features_of(SurfaceChannels(channels.base_color))))
    assert (plain.metallic < 0.1).all() and (plain.roughness - 0.5).abs().max() < 0.1


def test_ranges_and_normals():
    built = pbr(albedo_range=[0.2, 0.6], roughness_range=[0.5, 0.5], metallic_range=[0.0, 0.0], normal_strength=0.5)
    features = 50 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    normals, dirs = views(100)
    found = built.channels(ShadingInputs(features, normals=normals))
    assert found.base_color.min() == pytest.approx(0.2) and found.base_color.max() == pytest.approx(0.6)
    assert (found.roughness == 0.5).all() and (found.metallic == 0).all()
    assert built.features_of(found).isfinite().all()
    torch.testing.assert_close(found.normal.norm(dim=-1), torch.ones(100))
    # |offset| <= 0.5 sqrt(3), so the angle is at most asin(0.5 sqrt(3)) = 60 degrees.
    assert ((found.normal * normals).sum(-1) > 0.5 - 1e-5).all() and not torch.allclose(found.normal, normals)
    assert (
        built.channels(ShadingInputs(features)).normal is None
        and pbr().channels(ShadingInputs(features, normals=normals)).normal is None
    )
    assert not torch.allclose(
        built(ShadingInputs(features, normals=normals, view_dirs=dirs)),
        built(ShadingInputs(features * 1.0 - 60, normals=normals, view_dirs=dirs)),
    )


def test_gradients_of_map_roughness_and_all_else():
    built = pbr(environment_resolution=8, environment_levels=3, learned=True, normal_strength=0.5).double()
    normals, dirs = (x.double() for x in views(6, seed=3))
    features = 0.5 * torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def shade(features, log_radiance, normals):
        replaced = {"environment.log_radiance": log_radiance}
        inputs = ShadingInputs(features, normals=normals, view_dirs=dirs)
        return torch.func.functional_call(built, replaced, (inputs,))

    start = built.environment.log_radiance.detach().clamp(-3, -1)  # no value is clamped, so the function is smooth
    inputs = (features.requires_grad_(), start.requires_grad_(), normals.requires_grad_())
    assert torch.autograd.gradcheck(shade, inputs, fast_mode=True)


def test_a_learned_map_finds_the_light():
    """A dark map learns the color of the light from a rough and a smooth object."""
    target = pbr(SMOOTH * 0.5, environment_resolution=8)
    built = pbr(torch.full((8, 16, 3), 0.1), environment_resolution=8, learned=True)
    (group,) = built.parameter_groups()
    assert group["name"] == "material" and len(group["params"]) == 1
    optimiser = torch.optim.Adam(group["params"], lr=0.1)
    normals, dirs = views(400)
    features = torch.zeros(400, 5)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        goal = target(ShadingInputs(features, normals=normals, view_dirs=dirs))
        loss = (built(ShadingInputs(features, normals=normals, view_dirs=dirs)) - goal).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


def test_a_fixed_map_has_no_state_and_no_parameters():
    assert pbr().parameter_groups() == [] and list(pbr().state_dict()) == []
    assert list(pbr(learned=True, environment_resolution=8).state_dict()) == ["environment.log_radiance"]


def test_studio_shows_white_as_white_and_keeps_it_in_range():
    light = EnvironmentLight(studio_panorama(32), levels=4, learned=False)
    irradiance = light.diffuse(texel_directions(16, 32).reshape(-1, 3))
    assert irradiance.min() > 0.25 and 0.8 < irradiance.max() < 1.0
    assert (irradiance.std(dim=1) < 0.02).all()


def test_mixed_precision_shades_in_single_precision():
    built = pbr(learned=True, environment_resolution=8, environment_levels=3)
    normals, dirs = views(20)
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = built(ShadingInputs(features.float(), normals=normals, view_dirs=dirs))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = built(ShadingInputs(features, normals=normals, view_dirs=dirs))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, expected)


def test_back_facing_and_degenerate_normals_stay_finite():
    normals = torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0], [0, 0, 0]], requires_grad=True)
    dirs = torch.tensor([[0.0, 0, -1], [0, 0, -1], [0, 0, -1], [0, 0, -1]])
    features = torch.zeros(4, 5, requires_grad=True)
    color = pbr()(ShadingInputs(features, normals=normals, view_dirs=dirs))
    color.sum().backward()
    assert color.isfinite().all() and normals.grad.isfinite().all() and features.grad.isfinite().all()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs normals and view directions"):
        pbr()(ShadingInputs(torch.zeros(1, 5), normals=torch.ones(1, 3)))
    with pytest.raises(ValueError, match=r"^environment_map: there is no file .*nowhere.hdr"):
        pbr(environment_map="nowhere.hdr")
    with pytest.raises(ConfigError, match="roughness_range: the first value must not exceed"):
        pbr(roughness_range=[0.9, 0.1])
