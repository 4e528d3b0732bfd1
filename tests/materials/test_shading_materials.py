"""Neural radiance and normal shading, and every material through a volume renderer."""

import pytest
import torch
from torch.nn import functional as F

from scoredist3d import registry
from scoredist3d.cameras import orbit
from scoredist3d.config.validation import parse_component
from scoredist3d.materials import Material, ShadingInputs
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.procedural import CATEGORIES, COLORS, PATTERNS, render_objects, sample_objects
from scoredist3d.procedural.attributes import FINISHES
from scoredist3d.seeding import Rng
from scoredist3d.visualization.views import render_views


def material(name: str, **options) -> Material:
    return registry.build(parse_component("material", {"type": name, **options}), rng=Rng(3))


def unit(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)


def features(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(7))


def trained_radiance() -> Material:
    built = material("neural-radiance", num_features=5, hidden_width=8)
    with torch.no_grad():
        built.network.weights[-1].normal_(generator=torch.Generator().manual_seed(0))
    return built


def test_radiance_starts_as_the_sigmoid_of_three_features():
    built = material("neural-radiance", num_features=6)
    f = features(10, 6)
    torch.testing.assert_close(built(ShadingInputs(f, view_dirs=unit(10))), f[:, :3].sigmoid())
    torch.testing.assert_close(built.channels(ShadingInputs(f)).base_color, f[:, :3].sigmoid())
    colors = 0.1 + 0.8 * torch.rand(10, 3, generator=torch.Generator().manual_seed(0))
    again = built.channels(ShadingInputs(built.features_of(SurfaceChannels(colors)))).base_color
    torch.testing.assert_close(again, colors)


def test_radiance_depends_on_the_direction_once_trained():
    built = trained_radiance()
    f = features(10, 5)
    one, other = built(ShadingInputs(f, view_dirs=unit(10))), built(ShadingInputs(f, view_dirs=-unit(10)))
    assert (one - other).abs().max() > 0.05 and one.min() >= 0 and one.max() <= 1
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    mean = torch.stack([built(ShadingInputs(f, view_dirs=axis.expand(10, 3))) for axis in axes]).mean(0)
    torch.testing.assert_close(built.channels(ShadingInputs(f)).base_color, mean)
    # Only views along -x see a surface with normal +x.
    facing = torch.tensor([[1.0, 0, 0]]).expand(10, 3)
    seen = built.channels(ShadingInputs(f, normals=facing)).base_color
    torch.testing.assert_close(seen, built(ShadingInputs(f, view_dirs=-facing)), atol=1e-4, rtol=0)


def test_radiance_learns_a_highlight():
    built = material("neural-radiance", num_features=4)
    (group,) = built.parameter_groups()
    dirs = unit(200)
    target = 0.2 + 0.6 * (dirs[:, :1] > 0.5).float().expand(-1, 3)
    optimiser = torch.optim.Adam(group["params"], lr=0.01)
    for _ in range(150):
        optimiser.zero_grad()
        loss = (built(ShadingInputs(torch.zeros(200, 4), view_dirs=dirs)) - target).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 0.3 * target.var()  # the variance is the error of the best view-independent color


def test_radiance_is_seeded():
    first, second = (material("neural-radiance").network.weights[0] for _ in range(2))
    assert torch.equal(first, second)


def test_normals_as_colours():
    built = material("normal-shading", num_features=5)
    normals = torch.tensor([[0.0, 0, 1], [-1, 0, 0]])
    f = features(2, 5).requires_grad_()
    colors = built(ShadingInputs(f, normals=normals.requires_grad_()))
    assert colors.tolist() == [[0.5, 0.5, 1.0], [0.0, 0.5, 0.5]]
    colors.sum().backward()
    assert f.grad is None and normals.grad is not None
    assert (built.channels(ShadingInputs(f)).base_color == 0.5).all() and built.channels(
        ShadingInputs(f)
    ).base_color.shape == (2, 3)
    assert built.features_of(SurfaceChannels(features(4, 3))).shape == (4, 5)


def test_directional_light_by_hand():
    """Normals toward the key light, away from it, and up; the fill light is opposite and lower."""
    lights = {"ambient": 0.3, "hemisphere": 0.2, "key": 0.4, "fill": 0.1, "max_albedo": 1.0}
    built = material("directional-light", direction=[0.0, 0.0, 2.0], **lights)
    normals = torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0]])
    f = torch.zeros(3, 3, requires_grad=True)
    colors = built(ShadingInputs(f, normals=normals))
    torch.testing.assert_close(colors[:, 0], 0.5 * torch.tensor([0.3 + 0.2 + 0.4 + 0.1 * 0.25, 0.3, 0.3 + 0.1]))
    side = material("directional-light", direction=[3.0, 0.0, 0.0], **lights | {"hemisphere": 0.0})
    towards = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(side(ShadingInputs(f, normals=towards))[:, 2], 0.5 * torch.tensor([0.7, 0.4, 0.3]))
    assert (built.channels(ShadingInputs(f)).base_color == 0.5).all()
    albedo = 0.1 + 0.8 * torch.rand(3, 3, generator=torch.Generator().manual_seed(0))
    again = built.channels(ShadingInputs(built.features_of(SurfaceChannels(albedo)))).base_color
    torch.testing.assert_close(again, albedo)


def test_the_largest_albedo_bounds_both_images_and_textures():
    built = material("directional-light", max_albedo=0.8, ambient=0.5, hemisphere=0.0, key=0.0, fill=0.0)
    bright = ShadingInputs(torch.full((1, 3), 40.0), normals=torch.tensor([[0.0, 0.0, -1.0]]))
    torch.testing.assert_close(built(bright), torch.full((1, 3), 0.4))
    torch.testing.assert_close(built.channels(bright).base_color, torch.full((1, 3), 0.8))
    color = torch.tensor([[0.2, 0.5, 0.7]])
    again = built.channels(ShadingInputs(built.features_of(SurfaceChannels(color)))).base_color
    torch.testing.assert_close(again, color)


def test_directional_light_is_that_of_procedural_objects():
    """The image of a matt object, divided by the lighting of its normals, has one value for each part of the object."""
    red, bowl = COLORS.index("red"), CATEGORIES.index("bowl")
    matt = {"finish": FINISHES.index("matt"), "pattern": PATTERNS.index("plain")}
    generator = torch.Generator().manual_seed(2)
    objects = sample_objects(3, generator, category=bowl, color=red, second_color=red, **matt)
    angles = torch.tensor([0.0, 120.0, 240.0])
    constant = torch.ones(3)
    cameras = orbit(angles, 20 * constant, 3.2 * constant, 40 * constant, 32, 32)
    render = render_objects(objects, cameras, antialias=1)
    built = material("directional-light", max_albedo=1.0)
    for rgba, normal in zip(render.rgba, render.normal, strict=True):
        inside = rgba[..., 3] > 0.999
        white = built(ShadingInputs(torch.full((int(inside.sum()), 3), 40.0), normals=normal[inside]))
        albedo = rgba[inside][:, 0] / white[:, 0]
        assert inside.sum() > 50 and len(white[:, 0].round(decimals=2).unique()) > 20
        # The parts of an object differ slightly in brightness.
        assert len(albedo.round(decimals=2).unique()) <= 8
    assert not built.baked_lighting


def test_directional_light_shapes_the_surface():
    """The gradient reaches the normals; strengths and direction are checked."""
    normals = unit(5).requires_grad_()
    material("directional-light")(ShadingInputs(features(5, 3), normals=normals)).sum().backward()
    assert normals.grad is not None and normals.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"direction: .* must not be 0, 0, 0"):
        material("directional-light", direction=[0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normal-shading", "needs normals"),
        ("directional-light", "needs normals"),
        ("neural-radiance", "needs view directions"),
    ],
)
def test_what_is_missing_is_said(name, message):
    built = material(name)
    with pytest.raises(ValueError, match=message):
        built(ShadingInputs(torch.zeros(2, built.num_features)))


OPTIONS = {
    "pbr": [
        {"environment_resolution": 8, "random_rotation": True, "normal_strength": 0.3},
        {"environment_resolution": 8, "environment_levels": 3, "learned": True},
    ],
    "latent": [{"output": "latents"}, {"output": "rgb"}],
}
CASES = [
    pytest.param(name, index, id=f"{name}{index or ''}")
    for name in registry.names("material")
    for index in range(len(OPTIONS.get(name, [{}])))
]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_every_material_trains_and_shows_in_a_volume(name, index):
    block = {
        "type": "text-to-3d",
        "geometry": {"grid": {"num_levels": 2, "log2_hashmap_size": 6}, "network": {"hidden_width": 8}},
        "renderer": {"num_samples": 8, "occupancy": {"resolution": 8}},
        "background": {"type": "environment"},
        "material": {"type": name, **OPTIONS.get(name, [{}])[index]},
        "guidance": {"type": "sds"},
    }
    data = {"type": "random-camera", "batch_size": 2, "height": 8, "width": 8}
    system = registry.build(
        parse_component("system", block),
        prior=registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": 8})),
        prompt="red left blob",
        cameras=registry.build(parse_component("data", data)),
        rng=Rng(1),
    )
    system.prepare_step(0, Rng(1))
    system.training_step(0, Rng(1)).loss.backward()
    trained = [p for group in system.parameter_groups() for p in group["params"] if p.grad is not None]
    assert trained and all(p.grad.isfinite().all() for p in trained)
    scene = system.scenes[0]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in scene.geometry.parameters())
    for p in scene.material.parameters():
        assert (p.grad is not None) == p.requires_grad
    (view,) = render_views(scene, system.evaluation_cameras([30.0], 15.0, 8, 8))
    assert view.rgb.shape == (1, 8, 8, 3) and view.rgb.min() >= 0 and view.rgb.max() <= 1
    shape = system.shapes()[0]
    found = shape.channels(0.5 * unit(5)).base_color
    assert found.shape == (5, 3) and found.min() >= 0 and found.max() <= 1
