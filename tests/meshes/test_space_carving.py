"""Space carving: evidence of exact and wrong depths, what is removed from a solid mug, and what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shared.carving_scenes import (
    CELL,
    CELLS,
    MUG,
    SOLID,
    THIN,
    VIEWS,
    camera_ring,
    exact_views,
    joined,
    lattice,
    level_views,
    mug_views,
    scaled,
    some,
)
from torch import Tensor
from torch.nn.functional import max_pool3d

from scoredist3d.cameras import orbit
from scoredist3d.meshes.space_carving import DepthEstimates, carved, carving_evidence

SIDE = CELLS + 1
POINTS = lattice()


def cube(values: Tensor) -> Tensor:
    return values.view(*values.shape[:-1], SIDE, SIDE, SIDE)


def carve(distances: Tensor, views: DepthEstimates) -> Tensor:
    """(N^3,) distances after carving."""
    return carved(cube(distances), cube(carving_evidence(POINTS, views, CELL)), CELL).flatten()


def replaced(views: DepthEstimates, count: int, depth: float) -> DepthEstimates:
    """The first views show a surface at a constant depth in all of their pixels."""
    maps = {"depth": views.depth.clone(), "opacity": views.opacity.clone()}
    maps["depth"][:count], maps["opacity"][:count] = depth, 1.0
    return replace(views, **maps)


def one_view(size: int = 64, fovy: float = 80.0) -> DepthEstimates:
    """A plane at x = 0 that fills the image of a camera at x = 3."""
    cameras = orbit(*(torch.tensor([value]) for value in (0.0, 0.0, 3.0, fovy)), size, size)
    depth = 3.0 / cameras.rays().cosines
    return DepthEstimates(cameras, depth, torch.full_like(depth, 0.1), torch.ones_like(depth))


def test_evidence_of_a_plane_is_measured_along_rays() -> None:
    """The distance along the axis of the camera is the same in all pixels, so no rounding to pixels is left."""
    cell = 0.05
    through, at_surface, total, weight = carving_evidence(POINTS, one_view(), cell)
    towards = POINTS - torch.tensor([3.0, 0.0, 0.0])
    distance = towards.norm(dim=-1) * (3.0 / -towards[:, 0] - 1.0)
    # The error of the nearest pixel differs by less than 1 %: a pixel is 0.026 wide in units of the focal length.
    margin, tolerance = 2 * cell + 0.1, 0.001
    clear = (distance.abs() - margin).abs() > tolerance
    assert clear.float().mean() > 0.95
    assert torch.equal(through[clear], (distance > margin)[clear].float())
    assert torch.equal(at_surface[clear], (distance.abs() < margin)[clear].float())
    known = distance > -3 * cell + 1e-5
    torch.testing.assert_close((total / weight)[known], distance.clamp(-3 * cell, 3 * cell)[known], rtol=0, atol=1e-5)
    torch.testing.assert_close(weight[known], torch.full_like(weight[known], 10.0), rtol=0.01, atol=0)
    behind = distance < -3 * cell - 1e-5
    assert behind.any() and not weight[behind].any() and not total[behind].any()


def test_what_a_view_does_not_show_has_no_evidence() -> None:
    """Outside of the image, behind the camera, and at pixels with an opacity of 0.9 or less."""
    wide = one_view()
    for opacity in (0.0, 0.9):
        assert not carving_evidence(POINTS, replace(wide, opacity=torch.full_like(wide.opacity, opacity)), CELL).any()
    assert carving_evidence(POINTS, replace(wide, opacity=torch.full_like(wide.opacity, 0.91)), CELL).any()
    behind = POINTS + torch.tensor([4.5, 0.0, 0.0])
    assert not carving_evidence(behind, wide, CELL).any()
    narrow = one_view(fovy=10.0)
    evidence = carving_evidence(POINTS, narrow, CELL)
    slope = (POINTS[:, 1:].abs().amax(dim=-1) / (3.0 - POINTS[:, 0])) / torch.tan(torch.tensor(0.5 * 10.0).deg2rad())
    front = POINTS[:, 0] > 0.3
    assert not evidence[:, slope > 1 + 1e-5].any() and (evidence[0, front & (slope < 1 - 1e-5)] == 1).all()
    # Columns of the left half have y < 0, as seen from +x.
    half = wide.opacity.clone()
    half[:, :, 32:] = 0.5
    evidence = carving_evidence(POINTS, replace(wide, opacity=half), CELL)
    assert not evidence[:, POINTS[:, 1] > 1e-5].any() and (evidence[0, front & (POINTS[:, 1] < -1e-5)] == 1).all()


def test_evidence_adds_up_in_any_order() -> None:
    views = replaced(mug_views(), 3, 3.4)
    whole = carving_evidence(POINTS, views, CELL)
    odd = torch.arange(VIEWS) % 2 == 1
    parts = [carving_evidence(POINTS, some(views, index), CELL) for index in (odd, ~odd)]
    turned = carving_evidence(POINTS, some(views, torch.arange(VIEWS - 1, -1, -1)), CELL)
    for other in (parts[0] + parts[1], turned):
        assert torch.equal(whole[:2], other[:2])  # counts
        # Single precision: up to 24 terms of at most 3 cells / (0.25 cells).
        torch.testing.assert_close(whole[2], other[2], rtol=0, atol=1e-4)
        torch.testing.assert_close(whole[3], other[3], rtol=1e-5, atol=0)
        new, expected = (carved(cube(SOLID(POINTS)), cube(found), CELL) for found in (other, whole))
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-5)
    assert whole[0].max() > 12 and whole[1].max() > 12


def test_a_solid_mug_becomes_hollow() -> None:
    before, truth = SOLID(POINTS), MUG(POINTS)
    after = carve(before, mug_views())
    cavity = (before < 0) & (truth > 0)
    left = cavity & (after < 0)
    assert cavity.sum() > 2000 and not (left & (truth > CELL)).any()
    assert left.sum() < 0.2 * cavity.sum()  # measured: 14 %, all next to the wall
    # The wall, the bottom and the handle lose nothing, except for what is less than a quarter of a cell from the air.
    assert not ((after >= 0) & (truth < -0.25 * CELL)).any()
    near = max_pool3d(cube(cavity.float())[None], 7, stride=1, padding=3).flatten() > 0
    assert (~near & (before < 0)).sum() > 20 and torch.equal(after[~near], before[~near])


def test_a_cavity_that_no_view_sees_stays_closed() -> None:
    """From below the rim, nothing is seen of the inside."""
    views = some(mug_views(), mug_views().cameras.origins[:, 2] < 0.45)
    assert len(views.cameras) >= 6
    assert torch.equal(carve(SOLID(POINTS), views), SOLID(POINTS))


@pytest.mark.parametrize("name", ["mug", *THIN])
def test_exact_depths_remove_nothing_from_the_object_itself(name: str) -> None:
    sdf = {"mug": MUG, **THIN}[name]
    views = mug_views() if name == "mug" else exact_views(sdf, camera_ring(), error=0.01 * CELL)
    before = sdf(POINTS)
    assert int((before < 0).sum()) > 500
    assert torch.equal(carve(before, views), before)
    # With the same views, the space between the parts is emptied if it is filled.
    filled = (before - 4 * CELL).minimum(SOLID(POINTS))
    after = carve(filled, views)
    assert int(((filled < 0) & (after >= 0) & (before > CELL)).sum()) > 300
    assert not ((after >= 0) & (before < -0.3 * CELL)).any()


def test_three_wrong_views_change_nothing_and_four_do() -> None:
    """Depths behind the object in neighboring views, which see through the same points."""
    before, right = SOLID(POINTS), exact_views(SOLID, camera_ring())
    nearest = right.cameras.origins @ right.cameras.origins[0]
    views = some(right, nearest.argsort(descending=True))
    assert torch.equal(carve(before, replaced(views, 3, 4.2)), before)
    assert ((carve(before, replaced(views, 4, 4.2)) >= 0) & (before < 0)).sum() > 100
    # Alone, the wrong views are contradicted by nothing.
    wrong = replaced(views, VIEWS, 4.2)
    assert torch.equal(carve(before, some(wrong, slice(0, 3))), before)
    assert (carve(before, some(wrong, slice(0, 4))) > 0).sum() > (before > 0).sum() + 100


def test_views_of_the_surface_contradict_those_that_see_through() -> None:
    """Each view sees through the point or sees a surface there: at least three times as many must see through it."""
    point = torch.zeros(1, 3)
    cameras = camera_ring(VIEWS, 9)  # a pixel in the middle
    for seeing, through, removed in ((0, 4, True), (1, 4, True), (2, 5, False), (2, 6, True), (6, 17, False)):
        far = level_views(cameras[:through], 3 * CELL)
        near = level_views(cameras[through : through + seeing], -1.5 * CELL)
        evidence = carving_evidence(point, joined(far, near), CELL)
        assert evidence[:2, 0].tolist() == [through, seeing]
        everywhere = evidence.view(4, 1, 1, 1).expand(4, 3, 3, 3)  # a region large enough
        after = float(carved(torch.full((3, 3, 3), -1.0), everywhere, CELL)[1, 1, 1])
        assert (after >= 0.5 * CELL) == removed and (removed or after == -1.0)


def test_small_regions_are_errors() -> None:
    """27 connected points are removed, also if parts of the region only share a corner; 26 points are not."""
    for count, removed in ((26, False), (27, True)):
        inside, evidence = torch.full((9, 9, 13), -1.0), torch.zeros(4, 9, 9, 13)
        evidence[0, :2, :2, :2] = evidence[0, 2:4, 2:4, 2:4] = 20  # they share a corner
        evidence[0, 4, 2, 2 : 2 + count - 16] = 20
        assert bool((carved(inside, evidence, CELL) > 0).any()) == removed


def test_large_expected_errors_change_nothing() -> None:
    before, views = SOLID(POINTS), mug_views()
    assert not torch.equal(carve(before, views), before)
    assert torch.equal(carve(before, replace(views, error=torch.full_like(views.error, 1.0))), before)
    # With errors of 4 cells, only what is more than 6 cells in front of a surface can be removed.
    uncertain = carve(before, replace(views, error=torch.full_like(views.error, 4 * CELL)))
    assert 0 < ((uncertain >= 0) & (before < 0)).sum() < 0.8 * ((carve(before, views) >= 0) & (before < 0)).sum()


def test_the_error_of_a_view_is_its_weight() -> None:
    """The fused distance is the mean of the depths, weighted by their inverse errors."""
    cameras = camera_ring(2, 9)  # a pixel in the middle
    pair = joined(level_views(cameras[:1], CELL, error=0.1), level_views(cameras[1:], 2 * CELL, error=0.3))
    _, _, total, weight = carving_evidence(torch.zeros(1, 3), pair, CELL)
    assert float(total / weight) == pytest.approx((CELL / 0.1 + 2 * CELL / 0.3) / (1 / 0.1 + 1 / 0.3), abs=1e-5)
    assert float(weight) == pytest.approx(1 / 0.1 + 1 / 0.3, rel=1e-5)


def test_noise_of_the_expected_size_leaves_the_walls() -> None:
    """Normal errors whose mean absolute value is the expected error, half a cell."""
    exact, generator = mug_views(), torch.Generator().manual_seed(0)
    error = torch.full_like(exact.error, 0.5 * CELL)
    noise = torch.randn(exact.depth.shape, generator=generator) * error * (torch.pi / 2) ** 0.5
    before, truth = SOLID(POINTS), MUG(POINTS)
    after = carve(before, replace(exact, depth=exact.depth + noise, error=error))
    assert not ((after >= 0) & (truth < -0.75 * CELL)).any()
    cavity = (before < 0) & (truth > 1.5 * CELL)
    assert ((after >= 0) & cavity).sum() > 0.95 * cavity.sum()


def large_regions(mask: Tensor) -> Tensor:
    """The points of a mask in connected regions of at least 27 points, whose neighbors share a corner."""
    left, result = {tuple(point) for point in mask.nonzero().tolist()}, torch.zeros_like(mask)
    while left:
        region, new = set(), {left.pop()}
        while new:
            region |= new
            x, y, z = new.pop()
            near = {(x + i, y + j, z + k) for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)} & left
            left -= near
            new |= near
        if len(region) >= 27:
            result[tuple(torch.tensor(sorted(region)).T)] = True
    return result


def test_matter_is_never_added_and_nothing_changes_far_from_what_is_removed() -> None:
    """Random evidence; infinite distances mark points that the lattice does not have."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(12, 12, 12, generator=generator)
    before[0] = torch.inf
    through, at_surface = torch.randint(0, 9, (2, 12, 12, 12), generator=generator)
    at_surface //= 3  # otherwise few points are removed, in small regions
    weight = torch.rand(12, 12, 12, generator=generator) * (torch.rand(12, 12, 12, generator=generator) < 0.7)
    distance = 3 * CELL * (2 * torch.rand(12, 12, 12, generator=generator) - 1)
    through[6:] = 0
    evidence = torch.stack([through.float(), at_surface.float(), weight * distance, weight])
    kept = before.clone(), evidence.clone()
    after = carved(before, evidence, CELL)
    assert torch.equal(before, kept[0]) and torch.equal(evidence, kept[1])  # the arguments are not changed
    assert (after >= before).all() and torch.equal(after[0], before[0])
    removed = large_regions((before < 0) & (through >= 4) & (through >= 3 * at_surface))
    assert 50 < removed.sum() < 400 and (after[removed] >= 0.5 * CELL).all()
    assert torch.equal(after[9:], before[9:])  # more than three cells from x = 5
    assert (after[8] > before[8]).any()
    raised = after > before
    expected = distance.where(weight > 0, -3 * CELL)  # of an unknown point, which is inside
    torch.testing.assert_close(after[raised & ~removed], expected[raised & ~removed], rtol=0, atol=1e-6)
    assert torch.equal(carved(after, evidence, CELL), after)  # the same evidence removes nothing more
    assert torch.equal(carved(before, torch.zeros_like(evidence), CELL), before)


def test_the_result_scales_with_the_scene() -> None:
    views, larger = mug_views(), scaled(mug_views(), 3.0)
    evidence = carving_evidence(POINTS, views, CELL), carving_evidence(3 * POINTS, larger, 3 * CELL)
    # Rounding may move a point to the next pixel, or a distance over a limit.
    assert (evidence[0][:2] == evidence[1][:2]).all(dim=0).float().mean() > 0.99
    one = carved(cube(SOLID(POINTS)), cube(evidence[0]), CELL)
    three = carved(cube(3 * SOLID(POINTS)), cube(evidence[1]), 3 * CELL)
    assert (((three / 3 - one).abs() < 1e-5).float().mean()) > 0.99


def test_double_precision_is_kept() -> None:
    views = level_views(camera_ring(4, 8))
    cameras = replace(views.cameras, c2w=views.cameras.c2w.double(), fovy=views.cameras.fovy.double())
    double = DepthEstimates(cameras, views.depth.double(), views.error.double(), views.opacity.double())
    evidence = carving_evidence(POINTS.double(), double, CELL)
    assert evidence.dtype == torch.float64
    assert carved(cube(SOLID(POINTS).double()), cube(evidence), CELL).dtype == torch.float64
