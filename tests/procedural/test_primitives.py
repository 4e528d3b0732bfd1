"""Ray casting and occupancy of primitives."""

import pytest
import torch

from scoredist3d.cameras import orbit
from scoredist3d.procedural import CATEGORIES, cast_rays, occupancy, sample_objects, shade
from scoredist3d.procedural.builder import fit
from scoredist3d.procedural.primitives import NUM_HOLES, NUM_SOLIDS, empty_geometry


def _objects(per_category: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    category = torch.arange(len(CATEGORIES)).repeat_interleave(per_category)
    return sample_objects(len(category), generator, category=category)


def _cameras(count: int, size: int = 24, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    azimuth = 360 * torch.rand(count, generator=generator)
    elevation = -10 + 85 * torch.rand(count, generator=generator)
    return orbit(azimuth, elevation, torch.full((count,), 3.2), torch.full((count,), 40.0), size, size)


def _single(quadric=(1.0, 1.0), taper: float = 1.0, hole_radius: float | None = None) -> torch.Tensor:
    """One primitive of half-size 1 around the origin, optionally with an upright cylinder cut out of it."""
    geometry = empty_geometry(NUM_SOLIDS + NUM_HOLES, "cpu")[None]
    eye = torch.eye(3).flatten()
    geometry[:, 0, :9], geometry[:, 0, 12:14] = eye, torch.tensor(quadric)
    geometry[:, 0, [14, 16]], geometry[:, 0, [15, 17]] = (1 + taper) / 2, (taper - 1) / 2
    geometry[:, 0, 18:21] = torch.tensor([-1.0, -1.0, 1.0])
    if hole_radius is not None:
        geometry[:, NUM_SOLIDS, :9] = torch.diag(torch.tensor([1 / hole_radius, 1 / hole_radius, 0.5])).flatten()
        geometry[:, NUM_SOLIDS, 12] = 1.0
        geometry[:, NUM_SOLIDS, [14, 16]] = 1.0
        geometry[:, NUM_SOLIDS, 18:21] = torch.tensor([-1.0, -1.0, 1.0])
    return geometry


def _cast_one(geometry: torch.Tensor, origin: list[float], direction: list[float]):
    hits = cast_rays(geometry, torch.tensor([[origin]]), torch.tensor([[direction]]))
    return hits.t[0, 0].item(), hits.normal[0, 0].tolist(), hits.primitive[0, 0].item()


@pytest.mark.parametrize(
    ("name", "geometry", "origin", "direction", "distance", "normal"),
    [
        ("sphere", _single(), [3.0, 0, 0], [-1.0, 0, 0], 2.0, [1, 0, 0]),
        ("sphere off-centre", _single(), [3.0, 0.6, 0], [-1.0, 0, 0], 2.2, [0.8, 0.6, 0]),
        ("box", _single((0.0, 0.0)), [0.3, -3.0, 0.2], [0, 1.0, 0], 2.0, [0, -1, 0]),
        ("cylinder side", _single((1.0, 0.0)), [0.6, 3.0, 0.5], [0, -1.0, 0], 2.2, [0.6, 0.8, 0]),
        ("cylinder, ray along the axis", _single((1.0, 0.0)), [0.5, 0.5, 3.0], [0, 0, -1.0], 2.0, [0, 0, 1]),
        ("cone side", _single((1.0, 0.0), taper=0.0), [3.0, 0, 0], [-1.0, 0, 0], 2.5, [0.8**0.5, 0, 0.2**0.5]),
        ("cone from above", _single((1.0, 0.0), taper=0.0), [0.5, 0, 3.0], [0, 0, -1.0], 3.0, [0.8**0.5, 0, 0.2**0.5]),
        ("cone from below", _single((1.0, 0.0), taper=0.0), [0.2, 0, -3.0], [0, 0, 1.0], 2.0, [0, 0, -1]),
    ],
)
def test_known_hits(name, geometry, origin, direction, distance, normal):
    t, found, row = _cast_one(geometry, origin, direction)
    assert t == pytest.approx(distance, abs=1e-5), name
    assert found == pytest.approx(normal, abs=1e-5), name
    assert row == 0


def test_misses():
    for quadric, origin in [((1.0, 1.0), [3.0, 1.01, 0]), ((1.0, 0.0), [3.0, 0, 1.01]), ((0.0, 0.0), [3.0, 0, -1.01])]:
        t, normal, _ = _cast_one(_single(quadric), origin, [-1.0, 0, 0])
        assert t == float("inf")
        assert normal == [0, 0, 0]
    # Surfaces behind the origin of the ray are not hit.
    assert _cast_one(_single(), [3.0, 0, 0], [1.0, 0, 0])[0] == float("inf")


def test_hole_shows_its_inner_wall_and_can_be_looked_through():
    ring = _single((0.0, 0.0), hole_radius=0.5)
    assert _cast_one(ring, [0.2, 0.1, 3.0], [0, 0, -1.0])[0] == float("inf")
    assert _cast_one(ring, [0.8, 0.0, 3.0], [0, 0, -1.0])[0] == pytest.approx(2.0)
    # The ray enters through the opening and hits the far inner wall, whose normal points to the axis.
    t, normal, row = _cast_one(ring, [-1.0, 0.0, 2.5], [1.0, 0, -1.0])
    assert t == pytest.approx(1.5, abs=1e-5)
    assert normal == pytest.approx([-1, 0, 0], abs=1e-5)
    assert row == NUM_SOLIDS
    inside = occupancy(ring, torch.tensor([[[0.0, 0.0, 0.0], [0.45, 0.0, 0.9], [0.55, 0.0, 0.9], [0.9, 0.9, 0.0]]]))
    assert inside.tolist() == [[False, False, True, True]]


def test_occupancy_flips_at_every_hit():
    objects = _objects()
    cameras = _cameras(len(objects))
    directions = cameras.rays().directions.flatten(1, 2)
    origins = cameras.origins[:, None]
    hits = cast_rays(objects.geometry, origins, directions)
    hit = hits.t.isfinite()
    assert hit.float().mean() > 0.08
    t = torch.where(hit, hits.t, 0.0)[..., None]
    # The space in front of the hit is free. Behind it, rounding matters at edges that the ray grazes.
    before = objects.occupancy(origins + directions * (t - 1e-4))[hit]
    after = objects.occupancy(origins + directions * (t + 1e-4))[hit]
    assert before.float().mean() < 1e-3
    assert after.float().mean() > 0.995


def test_mask_and_depth_agree_with_marching():
    objects = _objects(1, seed=3)
    cameras = _cameras(len(objects), size=14, seed=4)
    directions = cameras.rays().directions.flatten(1, 2)
    origins = cameras.origins[:, None]
    hits = cast_rays(objects.geometry, origins, directions)
    steps = torch.arange(2.2, 4.2, 0.006)
    first = torch.full(hits.t.shape, float("inf"))
    for chunk in steps.split(50):
        points = origins[:, :, None] + directions[:, :, None] * chunk[:, None]
        inside = objects.occupancy(points.flatten(1, 2)).unflatten(1, points.shape[1:3])
        distance = torch.where(inside, chunk, float("inf")).amin(-1)
        first = torch.minimum(first, distance)
    agree = hits.t.isfinite() == first.isfinite()
    # Ray marching misses only intervals shorter than its step.
    assert agree.float().mean() >= 0.999
    assert not (first.isfinite() & ~hits.t.isfinite()).any()
    both = hits.t.isfinite() & first.isfinite()
    error = (first - hits.t)[both]
    assert error.min() > -1e-4
    assert (error < 0.0061).float().mean() > 0.995


def test_normals_match_differences_of_depth():
    objects = _objects(1, seed=5)
    cameras = _cameras(len(objects), size=20, seed=6)
    rays = cameras.rays()
    directions, origins = rays.directions.flatten(1, 2), cameras.origins[:, None]
    hits = cast_rays(objects.geometry, origins, directions)
    right, up = cameras.c2w[:, None, :3, 0], cameras.c2w[:, None, :3, 1]
    step = 2e-3  # in the direction; about 6e-3 at the object, large compared with the rounding of the depth
    points, same = [], hits.t.isfinite()
    for offset in (right, -right, up, -up):
        moved = torch.nn.functional.normalize(directions + step * offset, dim=-1)
        near = cast_rays(objects.geometry, origins, moved)
        same = same & (near.primitive == hits.primitive) & ((near.normal * hits.normal).sum(-1) > 0.95)
        points.append(origins + moved * torch.where(near.t.isfinite(), near.t, 0.0)[..., None])
    numeric = torch.linalg.cross(points[0] - points[1], points[2] - points[3])
    numeric = torch.nn.functional.normalize(numeric, dim=-1)
    cosine = (numeric * hits.normal).sum(-1)[same]
    assert len(cosine) > 1000
    assert (cosine > 0.995).float().mean() > 0.99
    facing = (hits.normal * directions).sum(-1)[hits.t.isfinite()]
    assert (facing < 1e-3).float().mean() > 0.999


def test_group_and_shared_origins_do_not_change_the_result():
    objects = _objects(1, seed=7)
    cameras = _cameras(len(objects), size=12, seed=8)
    directions = cameras.rays().directions.flatten(1, 2)
    shared = cast_rays(objects.geometry, cameras.origins[:, None], directions)
    origins = cameras.origins[:, None].expand_as(directions)
    for group in (3, NUM_SOLIDS):
        other = cast_rays(objects.geometry, origins, directions, group=group)
        torch.testing.assert_close(shared.t, other.t)
        assert torch.equal(shared.primitive, other.primitive)
        assert torch.allclose(shared.normal, other.normal, atol=1e-5)


def test_fit_centres_and_scales_a_stretched_sphere():
    geometry = _single()
    geometry[:, 0, 9:12] = torch.tensor([5.0, 0.0, 0.0])  # center (-5, 0, 0)
    fitted = fit(geometry, 1, torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([0.9]))
    points = torch.tensor([[[0.0, 0.0, 0.89], [0.0, 0.0, 0.91], [0.44, 0.0, 0.0], [0.46, 0.0, 0.0], [0.0, -0.44, 0.0]]])
    assert occupancy(fitted, points).tolist() == [[True, False, True, False, True]]


def test_caster_and_shader_compile_without_graph_breaks():
    objects = sample_objects(2, torch.Generator().manual_seed(9))
    directions = _cameras(2, size=4).rays().directions.flatten(1, 2)
    origins = _cameras(2, size=4).origins[:, None]
    light = torch.tensor([[0.3, 0.4, 0.8]]).expand(2, 3)

    def render(geometry, surface, origins, directions):
        hits = cast_rays(geometry, origins, directions, group=NUM_SOLIDS)
        return shade(surface, geometry, hits, light, directions, ink=(torch.ones_like(hits.t), light))

    compiled = torch.compile(render, fullgraph=True, backend="eager")
    arguments = (objects.geometry, objects.surface, origins, directions)
    torch.testing.assert_close(compiled(*arguments), render(*arguments))
