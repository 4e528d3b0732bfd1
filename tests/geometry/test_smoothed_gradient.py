"""Sobolev gradient of signed distances: the filter on full and partial lattices, and its effect on a surface."""

import math

import pytest
import torch
from shared.surface_scenes import build

from scoredist3d.geometry.smoothed_gradient import VertexLattice, smooth_gradient


def full_lattice(side):
    axis = torch.linspace(-1, 1, side)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def test_filter_is_a_gaussian_of_the_distance():
    points = full_lattice(21)
    lattice = VertexLattice.of(points, 0.1, 1.0)
    assert lattice.side == 21 and torch.equal(lattice.codes, torch.arange(21**3))
    center = len(points) // 2 + 3
    spike = torch.zeros(len(points)).index_fill(0, torch.tensor(center), 1.0)
    found = lattice.filtered(spike, 1.5)
    distance = (points - points[center]).norm(dim=1) / 0.1
    expected = torch.exp(-0.5 * (distance / 1.5) ** 2) / (1.5 * math.sqrt(2 * math.pi)) ** 3
    near = (points - points[center]).abs().amax(1) < 0.55
    torch.testing.assert_close(found[near], expected[near], rtol=1e-4, atol=1e-8)
    assert found.sum().item() == pytest.approx(1.0, abs=2e-3)
    assert found[(points - points[center]).abs().amax(1) > 0.65].abs().max() == 0


def test_filter_of_a_partial_lattice_ignores_the_missing_points():
    points, generator = full_lattice(9), torch.Generator().manual_seed(0)
    kept = torch.rand(len(points), generator=generator) < 0.4
    values = torch.randn(int(kept.sum()), generator=generator)
    dense = torch.zeros(len(points)).masked_scatter(kept, values)
    expected = VertexLattice.of(points, 0.25, 1.0).filtered(dense, 0.8)[kept]
    torch.testing.assert_close(VertexLattice.of(points[kept], 0.25, 1.0).filtered(values, 0.8), expected)


def test_values_on_the_lattice_are_indexed_by_coordinates():
    """Values x, y and z, at a part of the points in random order."""
    points, generator = full_lattice(5), torch.Generator().manual_seed(2)
    points = points[torch.randperm(125, generator=generator)[:60]]
    lattice = VertexLattice.of(points, 0.5, 1.0)
    grid = lattice.dense(points.T, torch.tensor([7.0, 8.0, torch.inf]))
    assert grid.shape == (3, 5, 5, 5)
    axis, known = torch.linspace(-1, 1, 5), grid[0] != 7.0
    assert known.sum() == 60 and (grid[1][~known] == 8.0).all() and grid[2][~known].isinf().all()
    for index, expected in enumerate(torch.meshgrid(axis, axis, axis, indexing="ij")):
        assert torch.equal(grid[index][known], expected[known])
    assert torch.equal(lattice.sparse(grid), points.T)
    assert torch.equal(lattice.sparse(torch.arange(125).view(1, 5, 5, 5))[0], lattice.codes)


def test_values_are_unchanged_and_their_gradient_is_filtered():
    lattice, generator = VertexLattice.of(full_lattice(7), 1 / 3, 1.0), torch.Generator().manual_seed(1)
    values = torch.randn(343, generator=generator, requires_grad=True)
    weights = torch.randn(343, generator=generator)
    smoothed = smooth_gradient(values, lattice, 1.2)
    assert torch.equal(smoothed, values)
    (found,) = torch.autograd.grad((weights * smoothed).sum(), values)
    torch.testing.assert_close(found, lattice.filtered(weights, 1.2))
    assert smooth_gradient(values, lattice, 0.0) is values


@pytest.mark.parametrize("name", ["dmtet", "flexicubes"])
def test_all_vertices_near_the_surface_move(name):
    counts = []
    for sigma in (0.0, 1.5):
        geometry = build("geometry", name, resolution=24, gradient_smoothing=sigma)
        geometry.update_step(0)
        geometry().vertices.square().sum().backward()
        moved = geometry.sdf.grad != 0
        counts.append(int(moved.sum()))
        reach = geometry.sdf.detach()[moved].abs().max() / geometry.spacing
        assert reach < 2.0 if sigma == 0 else reach > 3.0
    assert counts[1] > 2 * counts[0]


def test_the_width_follows_its_schedule():
    schedule = {"from": 2.0, "to": 0.0, "end": 10}
    geometry = build("geometry", "flexicubes", resolution=16, gradient_smoothing=schedule)
    counts = []
    for step in (0, 10):
        geometry.zero_grad()
        geometry.update_step(step)
        geometry().vertices.square().sum().backward()
        counts.append(int((geometry.sdf.grad != 0).sum()))
    assert counts[1] < counts[0]
