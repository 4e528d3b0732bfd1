"""The latent material: its linear map to colors, and continuation of a run in color."""

import pytest
import torch
from shared.embedded import HALF, LATENT_CHANNELS
from torch.nn import functional

from scoredist3d import registry
from scoredist3d.config.validation import parse_component
from scoredist3d.materials import ShadingInputs
from scoredist3d.materials import latent as latent_module
from scoredist3d.meshes.exportable import SurfaceChannels
from scoredist3d.seeding import Rng
from scoredist3d.visualization.views import render_views


class LinearPrior(torch.nn.Module):
    """A prior whose latents are an affine map of the mean colors of 4 x 4 blocks, which the fit must invert."""

    image_size = 64

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.register_buffer("mix", torch.randn(3, channels, generator=generator))
        self.register_buffer("shift", torch.randn(channels, generator=generator))
        self.calls = 0

    def encode(self, rgb: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        small = functional.avg_pool2d(rgb.movedim(-1, 1), 4).movedim(1, -1)
        return (small @ self.mix + self.shift).movedim(-1, 1)


def latent(prior, output: str = "latents"):
    return registry.build(parse_component("material", {"type": "latent", "output": output}), prior=prior)


def colors(count: int = 50) -> torch.Tensor:
    return 0.1 + 0.8 * torch.rand(count, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [3, 4, 8])
def test_the_map_is_the_inverse_of_the_encoder(channels):
    prior = LinearPrior(channels)
    built = latent(prior)
    assert (built.num_features, built.num_channels, built.outputs_latents) == (channels, channels, True)
    latents = colors() @ prior.mix + prior.shift
    torch.testing.assert_close(built.channels(ShadingInputs(latents)).base_color, colors(), atol=0.02, rtol=0)
    torch.testing.assert_close(built.display(latents.view(5, 10, -1)), colors().view(5, 10, 3), atol=0.02, rtol=0)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model on images of half its size: 8 x 8 latents."""
    return registry.build(parse_component("prior", {"type": "diffusers", **HALF}))


def test_embedded_prior_is_shown_closely(embedded):
    """A smooth image outside of the fit, encoded by the embedded model and converted to colors by the map."""
    built = latent(embedded)
    size = embedded.image_size
    across = torch.linspace(0.1, 0.9, size)[None].expand(size, size)
    picture = torch.stack([across, across.T, 1 - across], -1)
    with torch.no_grad():
        latents = embedded.encode(picture[None])
        shown = built.display(latents.movedim(1, -1))[0]
    small = functional.interpolate(picture.movedim(-1, 0)[None], shown.shape[:2], mode="area")[0].movedim(0, -1)
    assert (shown - small).square().mean() < 0.1 * small.var((0, 1)).mean()


def test_latents_pass_unchanged_and_their_map_is_not_trained():
    built = latent(LinearPrior(4))
    features = 5 * torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(built(ShadingInputs(features)), features)
    assert built.parameter_groups() == [] and not any(p.requires_grad for p in built.parameters())
    assert built.display(features).min() >= 0 and built.display(features).max() <= 1


def test_a_scene_goes_on_in_colour_with_the_same_weights():
    prior = LinearPrior(4)
    first, second = latent(prior), latent(prior, "rgb")
    with torch.no_grad():
        first.bias += 0.1
    second.load_state_dict(first.state_dict())  # strict: the same names and shapes
    assert (second.num_features, second.num_channels, second.outputs_latents) == (4, 3, False)
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(second(ShadingInputs(features)), first.display(features))
    (group,) = second.parameter_groups()
    assert {id(p) for p in group["params"]} == {id(second.weights), id(second.bias)}
    values = second(ShadingInputs(features))
    assert torch.equal(second.display(values), values)


def system(prior, output: str, seed: int):
    block = {
        "type": "text-to-3d",
        "geometry": {"grid": {"num_levels": 2, "log2_hashmap_size": 6}, "network": {"hidden_width": 8}},
        "renderer": {"num_samples": 8, "occupancy": {"resolution": 8}},
        "background": {"type": "environment"},
        "material": {"type": "latent", "output": output},
    }
    data = {"type": "random-camera", "batch_size": 1, "height": 8, "width": 8}
    return registry.build(
        parse_component("system", block),
        prior=prior,
        prompt="a red mug",
        cameras=registry.build(parse_component("data", data)),
        rng=Rng(seed),
    )


def test_a_run_in_latents_and_the_run_in_colour_after_it(embedded):
    """Only the background has another number of channels and starts anew."""
    first, second = system(embedded, "latents", 1), system(embedded, "rgb", 2)
    first.prepare_step(0, Rng(1))
    first.training_step(0, Rng(1)).loss.backward()
    (view,) = render_views(first.scenes[0], first.evaluation_cameras([0.0], 10.0, 8, 8))
    assert view.rgb.shape == (1, 8, 8, 3) and view.background.shape == (1, 8, 8, LATENT_CHANNELS)
    second.init_from(first.state_dict(), first.config)
    for name in ("geometry", "material"):
        ours, theirs = (getattr(run.scenes[0], name).state_dict() for run in (second, first))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    second.prepare_step(0, Rng(1))
    second.training_step(0, Rng(1)).loss.backward()
    assert second.scenes[0].material.weights.grad.abs().max() > 0


def test_colours_outside_the_range_come_back():
    built = latent(LinearPrior(4), "rgb")
    features = (6 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert ((built(ShadingInputs(features)) == 0) | (built(ShadingInputs(features)) == 1)).any()
    optimiser = torch.optim.Adam([features], lr=0.3)
    for _ in range(200):
        optimiser.zero_grad()
        loss = (built(ShadingInputs(features)) - 0.5).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < 1e-3


@pytest.mark.parametrize("output", ["latents", "rgb"])
def test_features_of_colours(output):
    built = latent(LinearPrior(4), output)
    features = built.features_of(SurfaceChannels(colors()))
    torch.testing.assert_close(built.channels(ShadingInputs(features)).base_color, colors(), atol=1e-4, rtol=0)


def test_one_fit_for_all_scenes_of_a_run_without_global_randomness():
    prior = LinearPrior(4)
    state = torch.random.get_rng_state()
    first, second = latent(prior), latent(prior)
    assert prior.calls == 1 and torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.weights, second.weights) and first.weights.data_ptr() != second.weights.data_ptr()
    other = latent_module.latent_colors(LinearPrior(4))
    assert torch.equal(other[0], first.weights)


def test_without_a_prior_it_is_refused():
    with pytest.raises(ValueError, match=r"^type: latent needs a prior"):
        registry.build(parse_component("material", {"type": "latent"}))
