"""Adaptive density control: selection, splitting, optimizer moments, statistics, schedule and resuming."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from shared.gaussian_clouds import BUSY, NAMES, gaussians, optimizer_of, train, view
from torch import Tensor

from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.base import GaussianSet
from scoredist3d.geometry.gaussians.density_control import DensifyConfig, select_for_densification, split_means
from scoredist3d.geometry.gaussians.model import Gaussians
from scoredist3d.geometry.gaussians.optimizer_state import resize_rows
from scoredist3d.ops.rotations import rotation_matrices
from scoredist3d.seeding import Rng
from scoredist3d.training.checkpoint import load_weights


def test_which_gaussians_are_cloned_and_split():
    config = DensifyConfig(grad_threshold=1.0, size_threshold=0.1, max_points=8)
    gradients = torch.tensor([0.5, 1.0, 2.0, 3.0, -1.0])
    scales = torch.tensor([[0.1], [0.3], [0.05], [0.21], [0.05]]).expand(-1, 3)
    masks = select_for_densification(config, gradients, scales, 2.0)
    assert masks.clone.tolist() == [False, False, True, False, False]
    assert masks.split.tolist() == [False, True, False, True, False]
    one = select_for_densification(
        DensifyConfig(grad_threshold=1.0, size_threshold=0.1, densify_fraction=0.2), gradients, scales, 2.0
    )
    assert one.split.tolist() == [False, False, False, True, False] and not one.clone.any()
    full = select_for_densification(DensifyConfig(grad_threshold=0.0, max_points=5), gradients, scales, 2.0)
    assert not full.clone.any() and not full.split.any()


def test_parts_are_drawn_from_the_gaussian_itself():
    quaternion = torch.nn.functional.normalize(torch.tensor([[0.3, -0.5, 0.7, 0.2]]), dim=-1)
    scales = torch.tensor([[0.1, 0.5, 0.02]])
    count = 20000
    cloud = GaussianSet(
        torch.tensor([[1.0, 2.0, 3.0]]).expand(count, -1),
        scales.expand(count, -1),
        quaternion.expand(count, -1),
        torch.ones(count),
        torch.zeros(count, 3),
    )
    parts = split_means(cloud, torch.Generator().manual_seed(0))
    rotation = rotation_matrices(quaternion)[0]
    covariance = rotation @ torch.diag(scales[0] ** 2) @ rotation.T
    torch.testing.assert_close(torch.cov(parts.T), covariance, atol=3e-3, rtol=0)
    torch.testing.assert_close(parts.mean(0), torch.tensor([1.0, 2.0, 3.0]), atol=0.01, rtol=0)


def test_a_clone_a_split_and_a_removal_by_hand():
    """Gaussian 0 is kept, 1 cloned, 2 split; 3 is too transparent and 4 too large."""
    geometry = gaussians(num_points=5, densify={"start": 1, "every": 1, "grad_threshold": 1.0, "size_threshold": 0.1})
    optimizer = optimizer_of(geometry)
    with torch.no_grad():
        geometry.log_scales.copy_(torch.tensor([0.05, 0.05, 0.2, 0.05, 0.6]).log()[:, None].expand(-1, 3))
        geometry.opacity_logits.copy_(torch.logit(torch.tensor([0.5, 0.6, 0.7, 0.001, 0.5])))
        geometry.features.copy_(torch.arange(5.0)[:, None].expand(-1, 3))
    sum(
        (getattr(geometry, name) * torch.arange(1.0, 6).view(5, *[1] * (getattr(geometry, name).ndim - 1))).sum()
        for name in NAMES
    ).backward()
    optimizer.step()
    before = {name: getattr(geometry, name).detach().clone() for name in NAMES}
    moments = {name: copy.deepcopy(optimizer.state[getattr(geometry, name)]) for name in NAMES}
    geometry.gradient_sum.copy_(torch.tensor([1.0, 4.0, 6.0, 0.0, 0.0]))
    geometry.views_seen.copy_(torch.tensor([2.0, 2.0, 3.0, 1.0, 0.0]))
    parameters = list(geometry.parameters())
    geometry.densification.step_post_backward(0, optimizer, Rng(4))
    assert all(one is other for one, other in zip(parameters, geometry.parameters(), strict=True))
    assert len(geometry) == 5
    origin = [0, 1, 1, 2, 2]
    for name in NAMES:
        now = getattr(geometry, name)
        assert now.grad is None
        state = optimizer.state[now]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (moments[name][moment] != 0).all()
            assert torch.equal(state[moment][:2], moments[name][moment][:2])
            assert (state[moment][2:] == 0).all() and state[moment].shape == now.shape
        assert state["step"] == moments[name]["step"]
        if name in ("quaternions", "opacity_logits", "features"):
            assert torch.equal(now, before[name][origin])
    assert torch.equal(geometry.means[:3], before["means"][[0, 1, 1]])
    parts = geometry.means[3:] - before["means"][2]
    assert parts.norm(dim=-1).min() > 0 and parts.norm(dim=-1).max() < 5 * 0.2
    torch.testing.assert_close(geometry.log_scales[3:], before["log_scales"][[2, 2]] - math.log(1.6))
    assert torch.equal(geometry.log_scales[:3], before["log_scales"][[0, 1, 1]])
    assert (geometry.gradient_sum == 0).all() and geometry.views_seen.shape == (5,)


@pytest.mark.parametrize(("name", "several"), [("adam", False), ("adamw", False), ("sgd", False), ("adam", True)])
def test_moments_follow_their_gaussians(name, several):
    """Kept rows are updated as in a set that never contained the removed rows."""
    whole = gaussians(num_points=12, densify={"enabled": False})
    keep = torch.arange(12) % 3 != 0
    part = gaussians(num_points=8, densify={"enabled": False})
    part.load_state_dict({key: value[keep] for key, value in whole.state_dict().items()})
    optimizers = [optimizer_of(geometry, name, several=several) for geometry in (whole, part)]

    def step(geometry: Gaussians, optimizer: torch.optim.Optimizer, rows: Tensor | slice, seed: int) -> None:
        for parameter in geometry.parameters():
            generator = torch.Generator().manual_seed(seed)
            gradient = torch.randn(12, *parameter.shape[1:], generator=generator)
            parameter.grad = gradient[rows][: len(parameter)].contiguous()
        optimizer.step()

    for seed in range(3):
        step(whole, optimizers[0], slice(None), seed)
        step(part, optimizers[1], keep, seed)
    rows = {parameter: parameter.new_ones(0, *parameter.shape[1:]) for parameter in whole.parameters()}
    resize_rows(optimizers[0], rows, keep)
    for seed in range(3, 6):
        step(whole, optimizers[0], keep, seed)
        step(part, optimizers[1], keep, seed)
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=1e-6)


def test_resizing_while_an_earlier_graph_is_alive():
    """Autograd caches the shape of a parameter while a graph that used it is alive."""
    geometry = gaussians(num_points=6, densify={"enabled": False})
    optimizer = optimizer_of(geometry)
    kept = (geometry.means * 2).sum()
    keep = torch.ones(6, dtype=torch.bool)
    resize_rows(optimizer, {geometry.means: torch.zeros(3, 3)}, keep)
    (geometry.means * 3).sum().backward()
    assert geometry.means.grad.shape == (9, 3) and kept.requires_grad


def test_statistics_are_gradients_per_normalised_coordinate():
    """The same image at twice the size gives the same statistics."""
    geometry = gaussians(num_points=40, densify={"start": 50})
    with torch.no_grad():
        geometry.log_scales.fill_(math.log(0.15))
    found = []
    for size in (32, 64):
        projected, color = view(geometry, size)
        projected.means2d.retain_grad()
        ramp = torch.linspace(0, 1, size + 1)[1:] - 0.5 / size
        (color * ramp[:, None]).mean().backward()
        expected = (2 * 0.5 * size * projected.means2d.grad).norm(dim=-1).sum(0)
        geometry.gradient_sum.zero_()
        geometry.views_seen.zero_()
        geometry.densification.step_post_backward(0, optimizer_of(geometry), Rng())
        torch.testing.assert_close(geometry.gradient_sum, expected)
        assert (geometry.views_seen == projected.count).all() and (geometry.views_seen == 2).all()
        found.append(geometry.gradient_sum.clone())
    # Only approximately, because the footprint of a pixel is smaller.
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.05 * float(found[1].max()))


def test_densification_follows_its_schedule():
    options = {"start": 4, "every": 3, "end": 9, "grad_threshold": 0.0, "prune_opacity": 0.0}
    geometry = gaussians(num_points=20, densify=options)
    optimizer, sizes = optimizer_of(geometry), []
    for step in range(14):
        train(geometry, optimizer, range(step, step + 1))
        sizes.append(len(geometry))
    assert sizes[:5] == [20] * 5 and sizes[5] > 20 and sizes[6] == sizes[7] == sizes[5]
    assert sizes[8] > sizes[7] and sizes[8:] == [sizes[8]] * 6
    assert gaussians().densifies and not gaussians(densify={"enabled": False}).densifies


def test_opacities_are_reset_and_their_moments_forgotten():
    geometry = gaussians(num_points=20, densify={"start": 90, "opacity_reset_every": 3, "prune_opacity": 0.01})
    optimizer = optimizer_of(geometry)
    train(geometry, optimizer, range(2))
    assert geometry().opacities.min() > 0.05
    train(geometry, optimizer, range(2, 3))
    torch.testing.assert_close(geometry().opacities, torch.full((20,), 0.02))
    assert (optimizer.state[geometry.opacity_logits]["exp_avg"] == 0).all()
    assert (optimizer.state[geometry.means]["exp_avg"] != 0).any()


def test_pruning_everything_is_an_error():
    geometry = gaussians(num_points=20, densify={"start": 1, "every": 1, "prune_opacity": 0.2})
    with pytest.raises(ValueError, match=r"geometry\.densify: pruning after step 0 would remove all Gaussians"):
        geometry.densification.step_post_backward(0, optimizer_of(geometry), Rng())


def test_means_stay_in_the_ball():
    geometry = gaussians(num_points=4, radius=0.5, densify={"enabled": False})
    with torch.no_grad():
        geometry.means[0] = torch.tensor([3.0, 0.0, 4.0])
        inside = geometry.means[1:].clone()
    geometry.densification.step_post_backward(0, optimizer_of(geometry), Rng())
    torch.testing.assert_close(geometry.means[0], torch.tensor([0.3, 0.0, 0.4]))
    assert torch.equal(geometry.means[1:], inside)


def test_densification_is_seeded():
    clouds = []
    for seed in (1, 1, 2):
        geometry = gaussians(num_points=40, densify=BUSY)
        train(geometry, optimizer_of(geometry), range(6), Rng(seed))
        clouds.append(geometry.state_dict())
    assert len(clouds[0]["means"]) != 40
    assert all(torch.equal(clouds[0][name], clouds[1][name]) for name in clouds[0])
    assert not torch.equal(clouds[0]["means"], clouds[2]["means"])


@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(several):
    """A state saved after a densification, with partly accumulated statistics, is loaded into new objects."""
    whole = gaussians(num_points=40, densify=BUSY)
    optimizer = optimizer_of(whole, several=several)
    train(whole, optimizer, range(7))
    assert len(whole) != 40 and whole.views_seen.any()
    saved, moments = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, range(7, 12))
    fresh = gaussians(num_points=40, densify=BUSY, rng=Rng(9))
    held = list(fresh.parameters())
    again = optimizer_of(fresh, several=several)
    load_weights(fresh, saved)
    again.load_state_dict(moments)
    assert all(one is other for one, other in zip(held, fresh.parameters(), strict=True))
    train(fresh, again, range(7, 12))
    first, second = whole.state_dict(), fresh.state_dict()
    assert len(first["means"]) != len(saved["means"])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_of_several_renders_add_up():
    """Two renders, each with its own backward pass, before one post-backward step."""
    geometry = gaussians(num_points=40, densify={"start": 50})
    alone = []
    for repeats in (1, 2):
        for _ in range(repeats):
            view(geometry)[1].square().mean().backward()
        geometry.densification.step_post_backward(0, optimizer_of(geometry), Rng())
        alone.append((geometry.gradient_sum.clone(), geometry.views_seen.clone()))
        geometry.clear_statistics()
    for one, two in zip(*alone, strict=True):
        torch.testing.assert_close(two, 2 * one)
    view(geometry)  # a render without a backward pass does not count
    geometry.densification.step_post_backward(1, optimizer_of(geometry), Rng())
    assert not geometry.views_seen.any()


def test_the_former_key_of_the_fraction_works():
    block = parse_component("geometry", {"type": "gaussians", "densify": {"grow_fraction": 0.3}})
    assert block.densify.densify_fraction == 0.3
