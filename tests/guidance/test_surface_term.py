"""The loss on normals and depths: its gradients, its use in HiFA, and what it needs."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.method_cases import SIZE, CountingPrior, latents, method, prompted, views
from shared.surface_estimators import write_opaque_estimator
from shared.tiny_runs import Recorder, plain
from torch import Tensor

from scoredist3d import registry
from scoredist3d.cameras import Cameras
from scoredist3d.config import ConfigError, FieldError
from scoredist3d.config.validation import parse_component, validate
from scoredist3d.guidance.core.surface_term import SurfaceTerm
from scoredist3d.guidance.hifa import HiFA
from scoredist3d.procedural.surface_estimator import SurfaceEstimator
from scoredist3d.renderers.base import Renderer
from scoredist3d.renderers.mesh_rasterizer import MeshRasterizer
from scoredist3d.seeding import Rng
from scoredist3d.training.checkpoint import read_checkpoint
from scoredist3d.training.run import run_training

T = 0.4
OPTIONS = {"weight": 1.0, "guidance_scale": 3.0, "latent_weight": 0.0, "image_weight": 0.3, "t_min": T, "t_max": T}


def uniform(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def unit_normals(seed: int, batch: int = 2, size: int = SIZE) -> Tensor:
    normal = uniform(seed, batch, size, size, 3, low=-1.0)
    return normal / normal.square().sum(-1, keepdim=True).sqrt()


def stepped_depths(seed: int, batch: int, size: int) -> Tensor:
    """Depths that differ by less than a jump, except for one pixel of each image."""
    depth = uniform(seed, batch, size, size, 1, low=2.9, high=3.05)
    depth[:, seed % size, 1] += 0.3
    return depth


def surface_map(seed: int, batch: int = 2, size: int = SIZE) -> Tensor:
    """A packed estimate whose normals do not have unit length, as after resizing."""
    normal = 0.7 * unit_normals(seed, batch, size)
    depth = stepped_depths(seed + 1, batch, size)
    opacity = uniform(seed + 2, batch, size, size, 1, low=0.897)
    errors = uniform(seed + 3, batch, size, size, 2, low=0.05)
    return torch.cat([normal, depth, opacity, errors], -1)


def documented(
    surface: Tensor, normal: Tensor, depth: Tensor, opacity: Tensor, by_normal: list[float], by_depth: list[float]
) -> Tensor:
    """The loss of the docstring, pixel by pixel."""
    total = torch.zeros((), dtype=torch.float64)
    batch, height, width, _ = normal.shape
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (batch, height, width))).tolist():
        target, n, d = surface[b, i, j], normal[b, i, j], depth[b, i, j, 0]
        around = (b, slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2))
        covered = (surface[around][..., 4] > 0.9).all() and (opacity[around] > 0.9).all()
        steps = [values.max() - values.min() for values in (surface[around][..., 3], depth[around])]
        if covered and max(steps) < 0.2:
            unit = target[:3] / target[:3].dot(target[:3]).sqrt()
            angle = torch.linalg.vector_norm(n - unit, ord=1) + 1.0 - n.dot(unit)
            total = total + by_normal[b] * angle / target[5] + by_depth[b] * (d - target[3]).abs() / target[6]
    return total


def shown(seed: int, batch: int = 2, size: int = SIZE) -> dict[str, Tensor]:
    """Normals, depths and opacities of a render; the opacities of some pixels are below 0.9."""
    return {
        "normal": unit_normals(seed, batch, size).requires_grad_(),
        "depth": stepped_depths(seed + 1, batch, size).requires_grad_(),
        "opacity": uniform(seed + 2, batch, size, size, 1, low=0.897).requires_grad_(),
    }


def test_gradients_are_those_of_the_documented_loss() -> None:
    surface, render = surface_map(0), shown(10)
    weights = torch.tensor([0.5, 2.0]).double(), torch.tensor([3.0, 0.25]).double()
    by_normal, by_depth = (weight[:, None, None] for weight in weights)
    with torch.no_grad():  # as in a step
        found = SurfaceTerm.gradients(surface, **render, normal_weight=by_normal, depth_weight=by_depth)
    loss = documented(surface, **render, by_normal=weights[0].tolist(), by_depth=weights[1].tolist())
    expected = torch.autograd.grad(loss, (render["normal"], render["depth"]))
    for one, two in zip(found, expected, strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    # In this case both maps limit the covered pixels.
    outside = (surface[..., 4:5] <= 0.9) | (render["opacity"] <= 0.9)
    assert 0.02 < outside.double().mean() < 0.9
    assert all((gradient * outside == 0).all() and (gradient[~outside[..., 0]] != 0).any() for gradient in found)


def test_nothing_is_compared_where_only_one_surface_is() -> None:
    ones, surface = torch.ones(2, 1, 1, dtype=torch.float64), surface_map(0)
    for target, rendered in ((0.95, 0.89), (0.89, 0.95), (0.89, 0.89)):
        surface[..., 4] = target
        render = shown(10) | {"opacity": torch.full((2, SIZE, SIZE, 1), rendered, dtype=torch.float64)}
        for gradient in SurfaceTerm.gradients(surface, **render, normal_weight=ones, depth_weight=ones):
            assert not gradient.any()


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_estimates_of_another_size_are_resized(size: int) -> None:
    """The left half of the estimate shows the object; columns at its edge, which mix both halves, are left out."""
    ones, render = torch.ones(1, 1, 1, dtype=torch.float64), shown(10, 1)
    render["opacity"] = torch.ones(1, SIZE, SIZE, 1, dtype=torch.float64)
    pixel = torch.tensor([0.0, 0.6, -0.8, 3.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    same, other = (pixel.expand(1, side, side, 7).clone() for side in (SIZE, size))
    same[:, :, SIZE // 2 :, 4] = other[:, :, size // 2 :, 4] = 0.0
    found = SurfaceTerm.gradients(other, **render, normal_weight=ones, depth_weight=ones)
    expected = SurfaceTerm.gradients(same, **render, normal_weight=ones, depth_weight=ones)
    for one, two in zip(found, expected, strict=True):
        assert not one[:, :, SIZE // 2 :].any()
        inner = slice(None, SIZE // 2 - 2)
        torch.testing.assert_close(one[:, :, inner], two[:, :, inner], rtol=0, atol=1e-9)
        assert one[:, :, inner].any()


def test_the_estimate_is_that_of_the_network(tmp_path: Path) -> None:
    folder = write_opaque_estimator(tmp_path)
    images, cameras = uniform(0, 2, 16, 16, 3).requires_grad_(), views(2)
    gray = torch.full((2, 4, 4, 3), 0.4, dtype=torch.float64)  # is resized
    found = SurfaceTerm(folder).estimate(images, gray, cameras)
    assert found.shape == (2, 16, 16, 7) and found.dtype == torch.float64 and not found.requires_grad
    with torch.no_grad():
        network = SurfaceEstimator.load(tmp_path)
        expected = network(images.float(), torch.full((2, 16, 16, 3), 0.4), cameras).packed()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5)
    assert (found[..., 4] > 0.9).all()


def test_a_folder_without_an_estimator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="contains no surface-estimator") as caught:
        SurfaceTerm(str(tmp_path))
    assert caught.value.path == "surface_estimator"
    with pytest.raises(FieldError, match=r"^surface_estimator: .*contains no surface-estimator"):
        hifa(tmp_path)


def hifa(folder: Path | str, **options: Any) -> HiFA:
    chosen = {"update_every": 3, "normal_weight": 0.5, "depth_weight": 2.0, "surface_estimator": str(folder)}
    guidance = method("hifa", CountingPrior(), **OPTIONS, **(chosen | options))
    assert isinstance(guidance, HiFA)
    return guidance


def step(guidance: HiFA, number: int, **maps: Tensor | None) -> Tensor:
    """The loss of one step with two views."""
    rgb, background = uniform(1, 2, SIZE, SIZE, 3).requires_grad_(), uniform(3, 2, SIZE, SIZE, 3)
    conditions = prompted(guidance, cameras=views(2))
    extra: dict[str, Any] = {"rgb": rgb, "background": background, "particles": (0, 0), **maps}
    return guidance(latents(2), conditions, number, Rng(), **extra).loss


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_opaque_estimator(tmp_path / "estimator")
    return tmp_path / "estimator"


@pytest.mark.parametrize(("weighting", "power"), [("lambda", 0), ("sds", 1)])
def test_normals_and_depths_have_the_gradients_of_the_term(folder: Path, weighting: str, power: int) -> None:
    """The weights of the term are multiplied by that of the regression, 1 or alpha sigma."""
    guidance = hifa(folder, weighting=weighting, normal_weight=[0, 1.0, 0.0, 4])
    render = shown(10)
    by_normal, by_depth = torch.autograd.grad(step(guidance, 1, **render), (render["normal"], render["depth"]))
    assert guidance.stored is not None
    images, behind, surface = guidance.stored.get(guidance.stored.keys((0, 0), views(2)))
    with torch.no_grad():
        network = SurfaceEstimator.load(folder)
        torch.testing.assert_close(surface.float(), network(images.float(), behind.float(), views(2)).packed())
    alpha, sigma = guidance.schedule.coefficients(torch.tensor([T], dtype=torch.float64))
    c = float(alpha * sigma) ** power
    # The weight of the normals falls from 1 at step 0 to 0 at step 4; the loss is a mean over the batch.
    loss = documented(surface, **render, by_normal=[0.75 * c] * 2, by_depth=[2.0 * c] * 2) / 2
    expected = torch.autograd.grad(loss, (render["normal"], render["depth"]))
    torch.testing.assert_close(by_normal, expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(by_depth, expected[1], rtol=0, atol=1e-9)
    assert by_normal.any() and by_depth.any()


def test_the_image_term_stays_as_it_is(folder: Path) -> None:
    render, gradients = shown(10), []
    for guidance in (hifa(folder), hifa(folder, normal_weight=0, depth_weight=0)):
        gradients.append(torch.autograd.grad(step(guidance, 0, **render), render["opacity"])[0])
        gradients.append(torch.autograd.grad(step(guidance, 1, **render), render["opacity"])[0])
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])


def test_the_estimator_runs_only_for_new_targets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = SurfaceEstimator.forward

    def counted(self: SurfaceEstimator, images: Tensor, *others: Any) -> Any:
        calls.append(len(images))
        return forward(self, images, *others)

    monkeypatch.setattr(SurfaceEstimator, "forward", counted)
    guidance = hifa(folder)
    for number in range(5):
        step(guidance, number, **shown(10))
    assert calls == [2, 2]  # at steps 0 and 3


def test_without_weights_nothing_is_loaded_or_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the estimator is not needed")

    for one in ({"normal_weight": 0.1}, {"depth_weight": 0.1}, {"depth_weight": {"from": 0.0, "to": 1.0, "end": 9}}):
        assert hifa(folder, **({"normal_weight": 0, "depth_weight": 0} | one)).config.maps() == {"normal"}
    monkeypatch.setattr(SurfaceEstimator, "load", load)
    guidance = hifa("nowhere", normal_weight=0, depth_weight=0)
    assert guidance.config.maps() == frozenset()
    render = shown(10)
    loss = step(guidance, 0, **render)
    assert torch.autograd.grad(loss, (render["normal"], render["depth"]), allow_unused=True) == (None, None)
    step(guidance, 1, opacity=render["opacity"])  # neither normals nor depths are required
    assert method("sds", CountingPrior()).config.maps() == frozenset()


def test_the_estimator_is_not_part_of_the_state(folder: Path) -> None:
    guidance = hifa(folder)
    assert list(guidance.state_dict()) == list(hifa(folder, normal_weight=0, depth_weight=0).state_dict())
    assert not list(guidance.parameters())


def test_what_cannot_be_estimated_is_refused(folder: Path) -> None:
    for weight in ("normal_weight", "depth_weight"):
        with pytest.raises(ValueError, match="update_every: normals and depths are estimated from kept targets"):
            method("hifa", CountingPrior(), **OPTIONS, **{weight: 0.1})
    render: dict[str, Any] = shown(10)
    for missing in ("normal", "depth"):
        with pytest.raises(FieldError, match="needs renders of a 3D scene with normals and depths") as caught:
            step(hifa(folder), 0, **(render | {missing: None}))
        assert caught.value.path == "normal_weight"


SCENES: dict[str, dict[str, Any]] = {
    "mesh": {
        "geometry": {"type": "dmtet", "resolution": 8, "grid": {"num_levels": 2, "log2_hashmap_size": 4}},
        "renderer": {"type": "mesh-rasterizer"},
    },
    # Dense enough for opaque pixels.
    "volume": {
        "geometry": {"grid": {"num_levels": 2, "log2_hashmap_size": 6}, "density_blob_strength": 200.0},
        "renderer": {"num_samples": 24, "occupancy": {"resolution": 8}},
    },
}


def system_block(scene: str, folder: Path, **weights: float) -> dict[str, Any]:
    kept = {"type": "hifa", "update_every": 3, "latent_weight": 0, "denoise_steps": 1, "image_weight": 0.1}
    guidance = {**kept, "surface_estimator": str(folder), **weights}
    return {"type": "text-to-3d", "guidance": guidance, **SCENES[scene]}


def test_the_renderer_must_output_what_the_method_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_component("system", system_block("mesh", folder, normal_weight=0.1))
    monkeypatch.setattr(MeshRasterizer, "outputs", frozenset({"position"}))
    with pytest.raises(
        ConfigError, match=r"guidance: hifa needs the map normal .* which the renderer mesh-rasterizer does not output"
    ):
        parse_component("system", system_block("mesh", folder, normal_weight=0.1))
    assert parse_component("system", system_block("mesh", folder))  # the weights are 0


@pytest.mark.parametrize("scene", list(SCENES))
def test_normals_and_depths_change_the_gradient_of_the_shape(
    scene: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[Set[str]] = []
    render = Renderer.__call__

    def noted(self: Renderer, cameras: Cameras, **options: Any) -> Any:
        needs.append(options["needs"])
        return render(self, cameras, **options)

    monkeypatch.setattr(Renderer, "__call__", noted)
    prior = registry.build(parse_component("prior", {"type": "gaussian-mixture", "image_size": SIZE}))
    data = parse_component("data", {"type": "random-camera", "batch_size": 2, "height": 32, "width": 32})
    gradients = []
    for weights in ({}, {"normal_weight": 0.1}, {"depth_weight": 0.1}):
        block = parse_component("system", system_block(scene, folder, **weights))
        built = registry.build(block, prior=prior, prompt="red blob", cameras=registry.build(data), rng=Rng())
        built.prepare_step(0, Rng())
        needs.clear()
        built.training_step(0, Rng()).loss.backward()
        assert needs == [frozenset({"normal"} if weights else ())]
        parameters = built.scenes[0].geometry.parameters()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradients.append(torch.cat([part.flatten() for part in parts]))
        assert gradients[-1].isfinite().all()
    without, normals, depths = gradients
    for first, second in ((without, normals), (without, depths), (normals, depths)):
        assert (first - second).norm() > 1e-3 * without.norm()


def test_a_resumed_run_continues_with_the_same_estimates(tmp_path: Path, folder: Path) -> None:
    def state(name: str, steps: int, resume: Path | None = None) -> tuple[Path, dict[str, Any]]:
        block = plain(tmp_path / name, trainer={"max_steps": steps}, test={"enabled": False})
        block["system"] = system_block("mesh", folder, normal_weight=0.1, depth_weight=1.0)
        block["data"] = {**block["data"], "num_views": 4}
        done = run_training(validate(block), devices="cpu", resume=resume, console=Recorder())
        loaded: dict[str, Any] = read_checkpoint(done.folder / "ckpts" / "last.ckpt")["state_dict"]
        return done.folder, loaded

    _, whole = state("whole", 5)
    half, _ = state("half", 2)
    _, resumed = state("half", 5, half)
    first, second = (found["guidance.stored._extra_state"]["surfaces"] for found in (whole, resumed))
    assert first.shape == (4, SIZE, SIZE, 7) and torch.equal(first, second)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole if isinstance(whole[key], Tensor))
