"""The image canvas: initialization, gradients, saved states, and its use by text-to-2d."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoredist3d import registry
from scoredist3d.cameras import Cameras, orbit
from scoredist3d.config import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.diffusion.samplers import denoise
from scoredist3d.geometry.image_canvas import ImageCanvas
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.analytic import GaussianMixturePrior
from scoredist3d.seeding import Rng

SIZE = 8


class Watched(GaussianMixturePrior):
    """A prior with two pixels per latent that records the rows of every prediction and the cameras of every text."""

    def __init__(self) -> None:
        super().__init__(GaussianMixturePrior.Config(image_size=SIZE, factor=2))
        self.rows: list[int] = []
        self.cameras: list[Cameras | None] = []

    def predict(self, x_t: Any, t: Any, conditioning: Any) -> Any:
        self.rows.append(len(x_t))
        return super().predict(x_t, t, conditioning)

    def embed(self, prompts: Any, cameras: Any = None) -> Any:
        self.cameras.append(cameras)
        return super().embed(prompts, cameras)


def canvas(
    prior: Any = None, *, seed: int = 0, view: Any = None, keep_start: bool = False, **options: Any
) -> ImageCanvas:
    config = parse_component("geometry", {"type": "image-canvas", "particles": 3, **options})
    return ImageCanvas(config, prior=prior or Watched(), rng=Rng(seed), view=view, keep_start=keep_start)


def image_file(folder: Any, mode: str = "RGB", size: tuple[int, int] = (SIZE, SIZE)) -> tuple[str, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    path = folder / "start.png"
    Image.fromarray(pixels, mode).save(path)
    return str(path), pixels


def everything(made: ImageCanvas, prior: Any) -> torch.Tensor:
    return made.latents(prior, torch.arange(len(made.values)))


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_noise_by_default_gray_without_deviation(kind: str) -> None:
    noise = canvas(parametrisation=kind, particles=64)
    middle, deviation = (0.0, 1.0) if kind == "latents" else (0.5, 0.5)
    count = noise.values.numel()
    # Standard errors of the mean s / sqrt(n) and of the standard deviation s / sqrt(2 n).
    assert abs(noise.values.mean().item() - middle) < 4 * deviation / count**0.5
    assert abs(noise.values.std().item() - deviation) < 4 * deviation / (2 * count) ** 0.5
    assert torch.equal(canvas(parametrisation=kind, particles=64).values, noise.values)
    assert not torch.equal(canvas(parametrisation=kind, particles=64, seed=1).values, noise.values)
    flat = canvas(parametrisation=kind, initial_std=0)
    assert torch.equal(flat.values, torch.full_like(flat.values, middle)) and not flat.starts_from_images


def test_what_is_optimised_gets_the_gradient() -> None:
    prior = Watched()
    for kind in ("latents", "pixels"):
        made = canvas(prior, parametrisation=kind)
        index = torch.tensor([2, 0])
        latents = made.latents(prior, index)
        assert latents.shape == (2, 3, SIZE // 2, SIZE // 2)
        latents.sum().backward()
        moved = made.values.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [True, False, True]
        pixels = made.pixels(prior, index)
        if kind == "latents":
            assert pixels is None
        else:
            assert pixels is not None and pixels.requires_grad
            torch.testing.assert_close(prior.encode(pixels), latents)
        assert made.images(prior).shape == (3, SIZE, SIZE, 3)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_every_particle_starts_from_the_image(tmp_path: Any, kind: str) -> None:
    prior = Watched()
    path, pixels = image_file(tmp_path)
    made = canvas(prior, parametrisation=kind, init_image=path)
    image = torch.from_numpy(pixels.astype(np.float32) / 255.0)[None].expand(3, -1, -1, -1)
    torch.testing.assert_close(everything(made, prior), prior.encode(image), rtol=0, atol=1e-6)
    if kind == "pixels":
        torch.testing.assert_close(made.images(prior), image, rtol=0, atol=1e-7)


def test_images_of_other_shapes_are_cut_and_scaled_and_transparent_parts_are_white(tmp_path: Any) -> None:
    prior = Watched()
    path, pixels = image_file(tmp_path, "RGBA", (24, 16))
    made = canvas(prior, parametrisation="pixels", init_image=path)
    square = pixels[:, 4:20].astype(np.float64) / 255.0
    over_white = square[..., :3] * square[..., 3:] + 1.0 - square[..., 3:]
    # Halving with an antialiasing filter keeps the mean of a 16 x 16 image but for its border; one level is 1 / 255.
    assert made.images(prior).mean().item() == pytest.approx(over_white.mean(), abs=0.02)
    assert made.images(prior).shape == (3, SIZE, SIZE, 3)


def test_mistakes_are_named(tmp_path: Any) -> None:
    prior = Watched()
    with pytest.raises(ValueError, match=r"^init_image: there is no file nowhere\.png"):
        canvas(prior, init_image="nowhere.png").begin(prior)
    text = tmp_path / "note.png"
    text.write_text("no image")
    with pytest.raises(ValueError, match=r"^init_image: .*note\.png cannot be read as an image"):
        canvas(prior, init_image=str(text)).begin(prior)
    with pytest.raises(ConfigError, match="cannot be combined with init_prompt"):
        parse_component("geometry", {"type": "image-canvas", "init_image": "a.png", "init_prompt": "red"})
    path, _ = image_file(tmp_path)
    with pytest.raises(ValueError, match=r"^size: this prior encodes images of 8 pixels"):
        canvas(prior, init_image=path, size=16).begin(prior)
    with pytest.raises(ValueError, match="construct it with keep_start"):
        canvas(prior).source(prior, torch.tensor([0]))


def test_particles_start_as_samples_of_a_text_each_from_its_own_noise() -> None:
    prior = Watched()
    made = canvas(prior, init_prompt="red left blob", init_steps=10, init_scale=2.0)
    assert prior.rows == [] and made.starts_from_images  # nothing is sampled before the first access
    values = everything(made, prior)
    assert prior.rows == [6] * 10
    noise = torch.stack([torch.randn(3, 4, 4, generator=Rng()(f"canvas/start/{particle}")) for particle in range(3)])
    conditions = CFGConditions(prior.embed(["red left blob"]), prior.embed([""]))
    expected = denoise(prior, noise, 1.0, conditions, steps=10, scale=2.0)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    (mode,) = [i for i, words in enumerate(prior._labels) if {"red", "left"} <= words]
    assert (
        values - prior._means[mode].float()
    ).square().mean().sqrt() < 0.2  # the standard deviation of the mixture is 0.1
    assert (values[0] - values[1]).abs().max() > 0.05
    everything(made, prior)
    assert len(prior.rows) == 20  # ten here and ten above: each canvas is initialized once


def test_a_start_depends_on_the_seed_and_the_particle_not_on_their_number_nor_the_kind() -> None:
    prior = Watched()
    options = {"init_prompt": "red", "init_steps": 4}
    few, many = (everything(canvas(prior, particles=count, **options), prior) for count in (2, 11))
    torch.testing.assert_close(many[:2], few, rtol=0, atol=1e-6)
    assert max(prior.rows) == 16  # eleven images take two batches of at most eight, with two texts each
    other = everything(canvas(prior, particles=2, seed=1, **options), prior)
    assert (other - few).abs().max() > 0.05
    pixels = canvas(prior, particles=2, parametrisation="pixels", **options)
    torch.testing.assert_close(pixels.images(prior), prior.decode(few).clamp(0, 1).detach(), rtol=0, atol=1e-6)


def test_the_view_is_told_to_the_prior_and_unknown_words_to_the_user(caplog: Any) -> None:
    prior = Watched()
    three, forty, angle = torch.tensor([3.0]), torch.tensor([40.0]), torch.tensor([20.0])
    view = orbit(angle, angle, three, forty, SIZE, SIZE)
    with caplog.at_level(logging.WARNING):
        canvas(prior, view=view, init_prompt="red gnu", init_steps=1).begin(prior)
    assert [camera is not None and camera.azimuth.item() for camera in prior.cameras] == [view.azimuth.item()] * 2
    (record,) = caplog.records
    assert record.getMessage().startswith("geometry.init_prompt: the prior's vocabulary lacks 'gnu'")
    prior.cameras.clear()
    canvas(prior, init_prompt="", init_steps=1).begin(prior)
    assert prior.cameras == [None, None]


def test_a_loaded_canvas_is_not_started_anew_and_keeps_its_start() -> None:
    prior = Watched()
    options = {"init_prompt": "red", "init_steps": 4, "keep_start": True, "parametrisation": "pixels"}
    first = canvas(prior, **options)
    everything(first, prior)
    start = first.values.detach().clone()
    with torch.no_grad():
        first.values.add_(0.1)
    index = torch.tensor([1, 2])
    torch.testing.assert_close(first.source(prior, index), prior.encode(start[index]))
    other = canvas(prior, seed=9, **options)
    other.load_state_dict(first.state_dict())
    prior.rows.clear()
    assert torch.equal(everything(other, prior), everything(first, prior)) and prior.rows == []
    assert torch.equal(other.source(prior, index), first.source(prior, index))
    assert set(canvas(prior).state_dict()) == {"values"} and set(first.state_dict()) == {"values", "start"}


def system(guidance: dict[str, Any], prior: Any = None, **geometry: Any) -> Any:
    block = {"type": "text-to-2d", "guidance": guidance, "geometry": {"particles": 3, **geometry}}
    return registry.build(
        parse_component("system", block), prior=prior or Watched(), prompt="blue left blob", rng=Rng(2)
    )


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_an_editing_method_sees_the_start_also_after_resuming(kind: str) -> None:
    guidance = {"type": "dds", "source_prompt": "red left blob", "guidance_scale": 2.0}
    geometry = {"parametrisation": kind, "init_prompt": "red left blob", "init_steps": 4}
    whole = system(guidance, **geometry)

    def steps(made: Any, numbers: range) -> None:
        for step in numbers:
            made.zero_grad()
            made.training_step(step, Rng(2)).loss.backward()
            with torch.no_grad():
                made.canvas.values.sub_(0.1 * made.canvas.values.grad.sign())

    start = whole.images()
    steps(whole, range(2))
    halted = system(guidance, **geometry)
    halted.load_state_dict(whole.state_dict())
    assert torch.equal(halted.canvas.start, whole.canvas.start)
    steps(whole, range(2, 4))
    steps(halted, range(2, 4))
    assert torch.equal(halted.canvas.values, whole.canvas.values)
    assert (whole.images() - start).abs().max() > 0.1


def test_an_edit_at_the_start_compares_equal_latents() -> None:
    """A stochastic encoder gets the same random numbers for both images."""

    class Drawing(Watched):
        def encode(self, rgb: Any, generator: Any = None) -> Any:
            mean = super().encode(rgb)
            return mean + 0.1 * torch.randn(mean.shape, generator=generator)

    guidance = {"type": "dds", "source_prompt": "blue left blob"}
    made = system(guidance, Drawing(), parametrisation="pixels", init_prompt="blue left blob", init_steps=4)
    result = made.training_step(0, Rng(2))
    assert float(result.scalars["guidance/gradient_rms"]) < 1e-5
    assert float(result.scalars["guidance/latent_rms"]) > 0.1


def test_editing_noise_is_warned_about(caplog: Any) -> None:
    guidance = {"type": "dds", "source_prompt": "red blob"}
    with caplog.at_level(logging.WARNING):
        system(guidance, init_prompt="red")
        assert not caplog.records
        system(guidance)
    (record,) = caplog.records
    assert "set geometry.init_prompt or geometry.init_image" in record.getMessage()


def test_image_space_terms_reach_pixels() -> None:
    guidance = {"type": "sds", "guidance_scale": 2.0, "weight": 1.0}
    plain, both = (system(guidance | {"image_weight": w}, parametrisation="pixels") for w in (0.0, 0.5))
    for made in (plain, both):
        made.training_step(0, Rng(2)).loss.backward()
    assert (both.canvas.values.grad - plain.canvas.values.grad).abs().max() > 1e-4


def test_registered_for_images_only() -> None:
    assert registry.lookup("geometry", "image-canvas").cls is ImageCanvas
