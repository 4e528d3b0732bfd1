import torch

from scoredist3d.ops.volume_rendering.occupancy import OccupancyGrid


def ball(points: torch.Tensor) -> torch.Tensor:
    """Density 50 within 0.5 of the origin, 0 outside."""
    return 50.0 * (points.norm(dim=1) < 0.5)


def centers(resolution: int, radius: float = 1.0) -> torch.Tensor:
    axis = ((torch.arange(resolution) + 0.5) / resolution * 2 - 1) * radius
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def update(grid: OccupancyGrid, times: int, density=ball, first: int = 0) -> None:
    for step in range(first, first + times):
        grid.update(density, torch.Generator().manual_seed(step))


def test_finds_the_object_and_only_it():
    grid = OccupancyGrid(16, 1.0)
    update(grid, 8)
    distance = centers(16).norm(dim=-1)
    cell = 3**0.5 / 16  # half a cell's diagonal
    assert grid.occupied[distance < 0.5 - cell].all()
    assert not grid.occupied[distance > 0.5 + cell].any()


def test_indices_are_xyz_and_scaled_by_the_radius():
    grid = OccupancyGrid(8, 2.0)
    update(grid, 4, lambda p: 50.0 * ((p[:, 0] > 0) & (p[:, 1] < 0) & (p[:, 2] > 0.5) & (p[:, 2] < 1)))
    where = grid.occupied.nonzero()
    assert len(where) > 0
    assert (where[:, 0] >= 4).all() and (where[:, 1] < 4).all() and (where[:, 2] == 5).all()


def test_starts_full_in_the_ball_and_never_outside():
    grid = OccupancyGrid(12, 1.5)
    outside = centers(12).norm(dim=-1) > 1 + 3**0.5 / 12
    assert grid.occupied[centers(12).norm(dim=-1) < 1].all() and not grid.occupied[outside].any()
    update(grid, 3, lambda p: torch.full((len(p),), 1000.0))
    assert not grid.occupied[outside].any()


def test_an_empty_scene_stays_alive():
    grid = OccupancyGrid(8)
    before = grid.occupied.clone()
    update(grid, 20, lambda p: torch.zeros(len(p)))
    assert torch.equal(grid.occupied, before)


def test_a_faint_scene_keeps_its_denser_part():
    # All optical depths are far below the threshold; the mean takes its place.
    grid = OccupancyGrid(8, threshold=0.01, step_size=0.01)
    update(grid, 2, lambda p: 1e-4 * (p[:, 0] > 0))
    assert grid.occupied[4:].any() and not grid.occupied[:4].any()


def test_vanished_density_is_forgotten():
    grid = OccupancyGrid(8, warmup_updates=1000)
    update(grid, 5)
    update(grid, 100, lambda p: 50.0 * (p[:, 0] > 0.8), first=5)  # 50 * 0.95^100 * 0.01 = 0.003 < 0.01
    assert not grid.occupied[:6].any() and grid.occupied[7].any()


def test_after_the_warmup_a_part_is_looked_at():
    grid = OccupancyGrid(16, warmup_updates=2)
    counts: list[int] = []

    def counting(points: torch.Tensor) -> torch.Tensor:
        counts.append(len(points))
        assert (points.abs() <= 1).all()
        return ball(points)

    update(grid, 4, counting)
    cells = int(grid.in_ball.sum())
    assert counts[:2] == [cells, cells] and cells // 4 <= counts[2] <= cells // 2


def test_resumes_bit_identically():
    straight, first, resumed = (OccupancyGrid(12, warmup_updates=3) for _ in range(3))
    update(straight, 9)
    update(first, 5)
    resumed.load_state_dict(first.state_dict())
    update(resumed, 4, first=5)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert set(straight.state_dict()) == {"occupied", "density", "num_updates"}


def test_chunks_do_not_matter():
    whole, parts = OccupancyGrid(8), OccupancyGrid(8)

    def drop(points: torch.Tensor) -> torch.Tensor:
        return 50.0 * (1 - points.norm(dim=1)).clamp_min(0)

    whole.update(drop, torch.Generator().manual_seed(0))
    parts.update(drop, torch.Generator().manual_seed(0), chunk=37)
    torch.testing.assert_close(whole.density, parts.density)
    assert whole.density.max() > 10
