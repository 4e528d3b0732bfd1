"""Training of the surface estimator: its views, loss and measurements, and the script in miniature."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import train_surface_estimator
from prior_training import surface
from prior_training.cameras import training_cameras
from prior_training.parts import Renderer
from prior_training.surface import SurfacePool, Surfaces, evaluate_surface_estimator, surface_loss
from shared.embedded import HALF
from torch import Tensor

from scoredist3d.cameras import Cameras
from scoredist3d.diffusion.cfg import guided_prediction
from scoredist3d.ops.shading.directional import DEFAULT_LIGHT
from scoredist3d.priors import CFGConditions
from scoredist3d.priors.diffusers_prior import DiffusersPrior
from scoredist3d.procedural import render_objects, sample_objects
from scoredist3d.procedural.surface_estimator import LEAST_ERROR, SurfaceEstimate, SurfaceEstimator

WEIGHTS = Path("assets", "surface-estimator", "surface-estimator.safetensors")


def arguments(folder: Path, *options: str) -> list[str]:
    return [
        *("--miniature", "--device", "cpu", "--work", str(folder / "work"), "--out", str(folder / "assets")),
        *options,
    ]


@pytest.fixture(scope="module")
def prior() -> DiffusersPrior:
    """The embedded prior at half its size, for speed."""
    return DiffusersPrior(DiffusersPrior.Config(pretrained_model_name_or_path="embedded", **HALF)).requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    assert train_surface_estimator.main(arguments(folder)) == 0
    return folder


def pool(prior: DiffusersPrior, count: int = 5, seed: int = 0) -> SurfacePool:
    return SurfacePool(prior, count, seed=seed, antialias=1, denoise_steps=1)


def test_views_of_a_pool(prior: DiffusersPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cameras, normals, depths and opacities belong to each other, also across groups and blocks."""
    monkeypatch.setattr(surface, "_GROUP", 3)
    monkeypatch.setattr(surface, "_BLOCK", 2)
    shown: list[Tensor | None] = []

    def noted(prior: DiffusersPrior, x: Tensor, t: Tensor, conditions: CFGConditions, scale: float) -> Any:
        shown.append(conditions.positive.camera)
        return guided_prediction(prior, x, t, conditions, scale)

    monkeypatch.setattr(surface, "guided_prediction", noted)
    surfaces = pool(prior).fill(0)
    size = prior.image_size
    assert [len(camera) for camera in shown if camera is not None] == [2, 1, 2]
    assert torch.equal(torch.cat(shown), prior.embed([""] * 5, surfaces.cameras).camera)
    assert len(surfaces.cameras.c2w.flatten(1).unique(dim=0)) == 5
    assert len(surfaces) == len(surfaces.cameras) == 5
    assert surfaces.image.shape == (5, size, size, 3) and surfaces.image.dtype == torch.uint8
    covered = surfaces.opacity > 127
    assert covered.flatten(1).any(1).all() and not covered.all()
    normal, depth = surfaces.normal.float() / 127, surfaces.depth.float()
    # Three rounded components: the length is off by at most sqrt(3) / 254.
    assert (normal[covered].norm(dim=-1) - 1).abs().max() < 0.007
    assert not normal[surfaces.opacity == 0].any() and not depth[surfaces.opacity == 0].any()
    rays = surfaces.cameras.rays()
    # Visible surfaces face their camera and lie in the unit ball, up to the rounding of the normals.
    assert (normal * rays.directions).sum(-1)[covered].max() < 0.02
    points = rays.origins + depth[..., None] * rays.directions
    assert points[covered].norm(dim=-1).max() < 1.01
    images, backgrounds, cameras = surfaces[torch.tensor([3, 1])].inputs()
    assert torch.equal(images, surfaces.image[[3, 1]].float() / 255) and len(cameras) == 2
    assert torch.equal(backgrounds[:, 0, 0], surfaces.background[[3, 1]]) and backgrounds.shape == images.shape


def test_fillings_are_different_and_repeatable(prior: DiffusersPrior) -> None:
    first, again, later = pool(prior, 2).fill(0), pool(prior, 2).fill(0), pool(prior, 2).fill(1)
    other = pool(prior, 2, seed=1).fill(0)
    for name in ("image", "background", "normal", "depth", "opacity"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.cameras.c2w, again.cameras.c2w)
    assert not torch.equal(first.image, later.image) and not torch.equal(first.image, other.image)


@pytest.mark.parametrize("scenes", [0.0, 1.0])
def test_denoised_images_resemble_the_renders(
    prior: DiffusersPrior, scenes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surface, "_PAIRS", scenes)
    filled = []
    for clean in (1.0, 0.0):
        monkeypatch.setattr(surface, "_CLEAN", clean)
        filled.append(pool(prior, 3).fill(0))
    renders, denoised = filled
    assert torch.equal(renders.depth, denoised.depth) and torch.equal(renders.normal, denoised.normal)
    behind = (255 * renders.background).round().to(torch.uint8)[:, None, None].expand_as(renders.image)
    empty = renders.opacity == 0
    assert torch.equal(renders.image[empty], behind[empty])
    error = (renders.image.float() - denoised.image.float()).abs().flatten(1).mean(1) / 255
    # The images of other objects are farther away; a prior without a prompt, or with a wrong one, blurs them.
    others = (renders.image.float() - denoised.image.roll(1, 0).float()).abs().flatten(1).mean(1) / 255
    assert (error > 0.001).all() and (error < 0.5 * others).all()


class Given:
    """An estimator that returns given outputs."""

    def __init__(self, maps: Tensor | None = None, estimate: SurfaceEstimate | None = None) -> None:
        self.maps, self.estimate = maps, estimate

    def raw(self, images: Tensor, backgrounds: Tensor, cameras: Cameras) -> Tensor:
        assert self.maps is not None
        return self.maps

    def __call__(self, images: Tensor, backgrounds: Tensor, cameras: Cameras) -> SurfaceEstimate:
        assert self.estimate is not None
        return self.estimate


@pytest.fixture(scope="module")
def known() -> Surfaces:
    """Renders of three objects."""
    generator = torch.Generator().manual_seed(0)
    objects = sample_objects(3, generator)
    cameras = training_cameras(3, 24, generator, torch.device("cpu"), varied=False)
    render = render_objects(objects, cameras, antialias=1)
    background = torch.full((3, 3), 0.5)
    return Surfaces(
        image=(255 * render.over(background)).round().to(torch.uint8),
        background=background,
        normal=(127 * render.normal).round().to(torch.int8),
        depth=render.depth.half(),
        opacity=(255 * render.rgba[..., 3]).round().to(torch.uint8),
        cameras=cameras,
    )


def true_outputs(surfaces: Surfaces, normal_scale: float, depth_scale: float) -> Tensor:
    """Raw outputs without errors, with expected errors b (3, 7, H, W)."""
    rotation = surfaces.cameras.w2c[:, :3, :3]
    normal = torch.einsum("bij,bhwj->bihw", rotation, surfaces.normal.float())
    depth = surfaces.depth.float() - surfaces.cameras.origins.norm(dim=-1)[:, None, None]
    logit = 20.0 * (2.0 * (surfaces.opacity.float() / 255) - 1.0)
    scales = [torch.full_like(depth, math.log(scale - LEAST_ERROR)) for scale in (normal_scale, depth_scale)]
    return torch.cat([normal, torch.stack([depth, logit, *scales], 1)], 1)


def test_the_loss_is_a_likelihood(known: Surfaces) -> None:
    """For constant errors e and scales b it is e / b + log b, summed over normals and depths."""
    maps = true_outputs(known, 0.5, 0.1)

    def loss(outputs: Tensor) -> float:
        given: Any = Given(outputs)
        return float(surface_loss(given, known))

    base = math.log(0.5) + math.log(0.1)
    assert loss(maps) == pytest.approx(base, abs=1e-4)
    farther = maps.clone()
    farther[:, 3] += 0.3
    assert loss(farther) == pytest.approx(base + 0.3 / 0.1, abs=1e-3)
    longer = maps.clone()
    longer[:, :3] *= 5.0  # the length of the normals does not matter
    assert loss(longer) == pytest.approx(base, abs=1e-4)
    # Opposite normals: ||2 N||_1 + 1 + 1, averaged over the covered pixels.
    covered = known.opacity > 127
    normal = torch.nn.functional.normalize(maps[:, :3].movedim(1, -1), dim=-1)
    opposite = maps.clone()
    opposite[:, :3] *= -1.0
    expected = (2.0 * normal.abs().sum(-1) + 2.0)[covered].mean().item() / 0.5
    assert loss(opposite) == pytest.approx(base + expected, rel=1e-4)
    # Nothing outside of the objects counts, but for the opacity: 20 per wrong pixel.
    outside = torch.where(covered[:, None], maps, maps + 1.0)
    outside[:, 4] = maps[:, 4]
    assert loss(outside) == pytest.approx(base, abs=1e-4)
    maps[:, 4] *= -1.0
    assert loss(maps) == pytest.approx(base + 20.0, abs=1e-3)


def test_mirror_images(known: Surfaces) -> None:
    """Rays through mirrored pixels of the mirrored camera meet the same points; true outputs have the same loss."""
    where = torch.tensor([True, False, True])
    mirrored = known.mirrored(where)
    points, others = (
        views.cameras.origins[:, None, None] + views.depth.float()[..., None] * views.cameras.rays().directions
        for views in (known, mirrored)
    )
    torch.testing.assert_close(
        others, torch.where(where[:, None, None, None], points.flip(2), points), rtol=0, atol=1e-5
    )
    expected = torch.where(where[:, None, None], known.opacity.flip(2), known.opacity)
    assert torch.equal(mirrored.opacity, expected) and not torch.equal(mirrored.opacity, known.opacity)
    assert torch.equal(mirrored.image[1], known.image[1])
    assert torch.equal(mirrored.mirrored(where).normal, known.normal)
    given: Any = Given(true_outputs(mirrored, 0.5, 0.1))
    base = math.log(0.5) + math.log(0.1)
    assert float(surface_loss(given, mirrored)) == pytest.approx(base, abs=1e-4)


def test_the_light_of_a_mirror_image() -> None:
    """Where the light is to the left of the object, its mirror image has the light to the right."""
    generator = torch.Generator().manual_seed(0)
    cameras = training_cameras(4, 8, generator, torch.device("cpu"), varied=False)
    maps = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    views = Surfaces(maps, torch.zeros(4, 3), maps.to(torch.int8), torch.zeros(4, 8, 8).half(), maps[..., 0], cameras)
    mirrored = views.mirrored(torch.ones(4, dtype=torch.bool)).cameras
    light = torch.tensor(DEFAULT_LIGHT)
    first, second = ((c.c2w[:, :3, :3].transpose(1, 2) @ light) for c in (cameras, mirrored))
    torch.testing.assert_close(second, first * torch.tensor([-1.0, 1.0, 1.0]))


def test_measurements_of_known_errors(known: Surfaces) -> None:
    opacity = known.opacity.float()[..., None] / 255
    normal = torch.nn.functional.normalize(known.normal.float(), dim=-1)
    # Turned by 30 degrees around an axis that is perpendicular to them.
    axis = torch.linalg.cross(normal, torch.tensor([0.3, 0.5, 0.8]).expand_as(normal))
    axis = torch.nn.functional.normalize(axis, dim=-1)
    turned = math.cos(math.pi / 6) * normal + math.sin(math.pi / 6) * torch.linalg.cross(axis, normal)
    shifted = known.depth.float()[..., None] + torch.tensor([0.1, 0.1, -0.05])[:, None, None, None]
    flipped = opacity.clone()
    flipped[:, :2] = 1.0 - flipped[:, :2]  # two of 24 rows
    given: Any = Given(estimate=SurfaceEstimate(turned, shifted, flipped, opacity, opacity))
    found = evaluate_surface_estimator(given, known)
    pixels = (known.opacity > 127).flatten(1).sum(1).float()
    share = (pixels[:2].sum() / pixels.sum()).item()
    assert found["normal_mean_deg"] == pytest.approx(30.0, abs=0.01)
    assert found["normal_median_deg"] == pytest.approx(30.0, abs=0.01)
    assert found["depth_mean"] == pytest.approx(0.1 * share + 0.05 * (1 - share), abs=1e-5)
    assert found["depth_off"] == pytest.approx(share, abs=1e-5)
    assert found["opacity_wrong"] == pytest.approx(2 / 24, abs=1e-5)


def test_the_renderer_has_depths_and_normals() -> None:
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    objects, cameras = sample_objects(2, generator), training_cameras(2, 16, generator, device)
    renderer = Renderer(16, 3, device, compile_=False)
    found, expected = renderer.render(objects, cameras), render_objects(objects, cameras, antialias=3)
    for name in ("rgba", "depth", "normal"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert torch.equal(renderer(objects, cameras), (255 * found.rgba).round().to(torch.uint8))


def test_the_script_writes_an_estimator_and_a_report(trained: Path) -> None:
    report = json.loads((trained / "work" / "surface-estimator.json").read_text())
    assert report["recipe"]["views"] == 6 and report["recipe"]["antialias"] == 1
    assert set(report["held_out"]) == {
        "normal_mean_deg",
        "normal_median_deg",
        "depth_mean",
        "depth_off",
        "opacity_wrong",
    }
    estimator = SurfaceEstimator.load(trained / WEIGHTS.parent)
    assert estimator.channels == (8, 8)
    assert not any(parameter.requires_grad for parameter in estimator.parameters())


def assert_averaged(folder: Path) -> None:
    """The written weights are the averages of the saved state."""
    state = torch.load(folder / "work" / "surface-estimator.pt", weights_only=True)
    averages, latest = state["emas"]["estimator"], state["modules"]["estimator"]
    written = SurfaceEstimator.load(folder / WEIGHTS.parent).state_dict()
    assert all(torch.equal(written[name], value.half().float()) for name, value in averages.items())
    assert any(not torch.equal(written[name], value.half().float()) for name, value in latest.items())


def test_an_interrupted_training_continues_as_if_nothing_had_happened(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of the same seed are equal, too: the other run was not interrupted."""
    assert train_surface_estimator.main(arguments(tmp_path, "--export-only")) == 1
    assert "contains no saved state yet" in capsys.readouterr().err
    calls: list[Tensor] = []

    def interrupted(*inputs: Any) -> Tensor:
        calls.append(inputs[-1].image)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return surface_loss(*inputs)

    monkeypatch.setattr(surface, "surface_loss", interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(surface, "Stage", partial(surface.Stage, save_every_s=-1.0))  # after every step
        with pytest.raises(KeyboardInterrupt):
            train_surface_estimator.main(arguments(tmp_path))
    assert not (tmp_path / WEIGHTS).exists()
    assert train_surface_estimator.main(arguments(tmp_path, "--export-only")) == 0
    assert "exported step 3" in capsys.readouterr().out
    assert_averaged(tmp_path)
    exported = (tmp_path / WEIGHTS).read_bytes()
    assert train_surface_estimator.main(arguments(tmp_path)) == 0
    assert len(calls) == 5 and torch.equal(calls[4], calls[3])  # the fourth step alone
    assert_averaged(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes() != exported


def test_a_training_can_continue_from_an_estimator(tmp_path: Path, trained: Path) -> None:
    """With a learning rate of 0 the weights stay, up to the rounding of their average, which fp16 does not show."""
    options = ["--init", str(trained / "assets"), "--peak-lr", "0", "--steps", "2", "--refills", "0", "--views", "2"]
    assert train_surface_estimator.main(arguments(tmp_path, *options)) == 0
    assert (tmp_path / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    report = json.loads((tmp_path / "work" / "surface-estimator.json").read_text())
    assert report["recipe"]["steps"] == 2 and report["recipe"]["batch"] == 3
