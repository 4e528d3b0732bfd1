"""The tetrahedral lattice and its cache file."""

import math
import re

import pytest
import safetensors.torch
import torch

from scoredist3d.ops.isosurface import tetrahedra
from scoredist3d.ops.isosurface.tetrahedra import TET_EDGES, generate, tetrahedral_grid


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Start each test with an empty cache, in memory and on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tetrahedral_grid.cache_clear()
    yield tmp_path / "scoredist3d"
    tetrahedral_grid.cache_clear()


def volumes(grid: dict[str, torch.Tensor]) -> torch.Tensor:
    corners = grid["vertices"].double()[grid["tets"].long()]
    return torch.linalg.det(corners[:, 1:] - corners[:, :1]) / 6


@pytest.mark.parametrize("resolution", [2, 4, 10, 32])
def test_fills_the_cube_with_positive_volumes(resolution):
    grid = generate(resolution)
    volume = volumes(grid)
    # Inner tetrahedra are congruent, (2 / resolution)^3 * 2/3; those at the sides of the box are half of one.
    whole = (2 / resolution) ** 3 * 2 / 3
    assert volume.sum().item() == pytest.approx(8, rel=1e-6)
    assert set((volume / whole).round(decimals=4).tolist()) <= {0.5, 1.0}
    cubes = resolution // 2
    assert len(volume) == 12 * cubes**2 * (cubes + 1)
    assert len(grid["vertices"]) == (cubes + 1) ** 3 + cubes**3 + 6 * cubes**2


def test_tetrahedra_fit_together():
    """Inner triangles have two tetrahedra, on opposite sides; the others are on the boundary of the box."""
    grid = generate(6)
    opposite = ((1, 2, 3), (0, 3, 2), (0, 1, 3), (0, 2, 1))  # each seen counter-clockwise from outside
    triangles = torch.cat([grid["tets"][:, list(three)] for three in opposite]).long()
    keys, inverse, counts = triangles.sort(dim=1).values.unique(dim=0, return_inverse=True, return_counts=True)
    assert set(counts.tolist()) == {1, 2}
    order = triangles.argsort(dim=1).argsort(dim=1)
    even = ((order[:, 1] - order[:, 0]) % 3 == 1).long() * 2 - 1  # sign of the permutation from sorted
    balance = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, inverse, even)
    assert (balance[counts == 2] == 0).all()
    border = grid["vertices"][keys[counts == 1]]
    assert ((border.abs() == 1).all(dim=1).any(dim=1)).all()


def test_edges():
    grid = generate(6)
    pairs = torch.stack([grid["tets"][:, list(pair)] for pair in TET_EDGES], dim=1).sort(dim=2).values
    assert torch.equal(grid["edges"][grid["tet_edges"].long()], pairs)
    assert torch.equal(grid["edges"].unique(dim=0), pairs.reshape(-1, 2).unique(dim=0))
    assert len(grid["edges"].unique(dim=0)) == len(grid["edges"])
    # A ball: V - E + F - T = 1 with F = (4 T + border) / 2.
    vertices, edges, tets = len(grid["vertices"]), len(grid["edges"]), len(grid["tets"])
    border = 6 * 3**2 * 4
    assert vertices - edges + (4 * tets + border) // 2 - tets == 1


def test_no_preferred_direction():
    """Reflections and rotations about the diagonal map the lattice onto itself, unlike Kuhn's subdivision."""
    grid = generate(4)
    steps = ((grid["vertices"] + 1) * 2).round().long()

    def edge_set(points: torch.Tensor) -> set[tuple[int, int]]:
        codes = (points * torch.tensor([25, 5, 1])).sum(dim=1)
        return {tuple(pair) for pair in codes[grid["edges"].long()].sort(dim=1).values.tolist()}

    mirrored = torch.cat((4 - steps[:, :1], steps[:, 1:]), dim=1)
    assert edge_set(steps) == edge_set(mirrored) == edge_set(steps.roll(1, dims=1))


def test_ball_keeps_all_that_touches_it():
    whole, ball = generate(16), generate(16, radius=0.7)
    assert len(ball["tets"]) < 0.45 * len(whole["tets"])
    assert volumes(ball).min() > 0
    assert torch.equal(ball["tets"].unique(), torch.arange(len(ball["vertices"]), dtype=torch.int32))
    # Points of the ball lie in kept tetrahedra: the smallest barycentric coordinate of the best one is not negative.
    points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).double()
    points = 0.7 * points / points.norm(dim=1, keepdim=True)
    corners = ball["vertices"].double()[ball["tets"].long()]
    inverse = torch.linalg.inv((corners[:, 1:] - corners[:, :1]).transpose(1, 2))
    coordinates = torch.einsum("tij,ntj->nti", inverse, points[:, None] - corners[:, 0])
    least = torch.minimum(coordinates.amin(dim=2), 1 - coordinates.sum(dim=2))
    assert (least.amax(dim=1) > -1e-6).all()


def test_dihedral_angles_of_the_inner_tetrahedra():
    corners = generate(8)["vertices"].double()[generate(8)["tets"].long()]
    inner = corners[(corners.abs() < 0.6).all(dim=2).all(dim=1)]
    normals = [
        torch.linalg.cross(inner[:, b] - inner[:, a], inner[:, c] - inner[:, a])
        for a, b, c in ((1, 2, 3), (0, 3, 2), (0, 1, 3), (0, 2, 1))
    ]
    units = torch.stack([normal / normal.norm(dim=1, keepdim=True) for normal in normals])
    for first, second in TET_EDGES:
        angle = 180 - (units[first] * units[second]).sum(dim=1).clamp(-1, 1).acos() * 180 / math.pi
        assert torch.isclose(angle[:, None], torch.tensor([60.0, 90.0]).double(), atol=1e-3).any(dim=1).all()


def test_kept_in_memory_and_on_disk(own_cache, monkeypatch):
    first = tetrahedral_grid(8)
    assert tetrahedral_grid(8) is first
    (path,) = own_cache.iterdir()
    assert re.fullmatch(r"tetrahedra-1-8-[0-9a-f]{24}\.safetensors", path.name)
    tetrahedral_grid.cache_clear()
    monkeypatch.setattr(tetrahedra, "generate", lambda *_: pytest.fail("made again although the file is there"))
    again = tetrahedral_grid(8)
    for name, value in generate(8).items():
        assert torch.equal(getattr(again, name), value) and getattr(again, name).dtype == value.dtype
    assert again.spacing == 0.25


def test_a_ball_and_the_cube_have_different_files(own_cache):
    assert len(tetrahedral_grid(8, 0.5).tets) < len(tetrahedral_grid(8, 0.75).tets) < len(tetrahedral_grid(8).tets)
    assert len(list(own_cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped bit", "flipped bit in the header", "not the format"])
def test_a_damaged_file_is_made_anew(own_cache, damage, caplog):
    good = tetrahedral_grid(6)
    (path,) = own_cache.iterdir()
    before = path.read_bytes()
    content = bytearray(before)
    if damage == "empty":
        content.clear()
    elif damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "not the format":
        content[:] = b"nothing of use"
    else:
        content[20 if "header" in damage else -5] ^= 1
    path.write_bytes(content)
    tetrahedral_grid.cache_clear()
    again = tetrahedral_grid(6)
    assert torch.equal(again.tets, good.tets) and torch.equal(again.tet_edges, good.tet_edges)
    assert [record.getMessage() for record in caplog.records] == [
        f"the cache file {path} is damaged (its checksum differs) and is regenerated"
    ]
    assert [entry.name for entry in own_cache.iterdir()] == [path.name] and path.read_bytes() == before


def test_a_full_disk_costs_the_file_only(own_cache, monkeypatch, caplog):
    def full(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert len(tetrahedral_grid(4).tets) == 144
    assert "no space left" in caplog.text and list(own_cache.iterdir()) == []


@pytest.mark.parametrize(("resolution", "radius"), [(3, None), (0, None), (-2, None), (514, None), (8, 0.0), (8, -1.0)])
def test_bad_arguments(resolution, radius):
    with pytest.raises(ValueError, match="tetrahedral grid"):
        tetrahedral_grid(resolution, radius)


def test_moves_to_a_device():
    moved = tetrahedral_grid(4).to("meta")
    assert moved.tets.device.type == "meta" and moved.spacing == 0.5
