"""Losses on fields (eikonal, sketch-shape), and the refusal of losses that do not fit a system."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
import trimesh
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scoredist3d import registry
from scoredist3d.config.fields import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry import Field, GeometryOutput
from scoredist3d.losses import Loss
from scoredist3d.renderers import Render
from scoredist3d.seeding import Rng


def build(kind: str, name: str, **options):
    return registry.build(parse_component(kind, {"type": name, **options}))


def views(opacity: float, position: Tensor | None = None) -> Render:
    """4 x 4 pixels with one opacity and one position."""
    place = torch.zeros(3) if position is None else position
    black = torch.zeros(1, 4, 4, 3)
    alpha = torch.full((1, 4, 4, 1), opacity)
    return Render(rgb=black, opacity=alpha, depth=alpha, background=black, position=place.expand(1, 4, 4, 3))


def sphere(**options):
    return build("geometry", "implicit-sdf", normal="analytic", shape_init_size=0.5, **options)


def test_eikonal_is_zero_for_a_distance():
    assert build("loss", "eikonal")(views(1.0), sphere(), 0, Rng()).item() == pytest.approx(0.0, abs=1e-6)


def test_eikonal_by_hand():
    """With sdf = |x| - 0.5 + 0.5 x_1: |gradient|^2 = 1 + 1/4 + x_1 / |x|, uniform in direction: u = cos in [-1, 1]."""
    geometry = sphere()
    term = build("loss", "eikonal", points=40_000)
    original = geometry._value
    geometry._value = lambda raw, points, distance: original(raw, points, distance) + 0.5 * points[:, 0]
    u = (torch.arange(10_000) + 0.5) / 5_000 - 1
    expected = ((1.25 + u).sqrt() - 1).square().mean()
    assert term(views(0.0), geometry, 0, Rng()).item() == pytest.approx(expected.item(), rel=0.03)
    # Half of the points are at the visible position (0.5, 0, 0), where |gradient| = 1.5.
    seen = term(views(1.0, torch.tensor([0.5, 0.0, 0.0])), geometry, 0, Rng())
    assert seen.item() == pytest.approx(0.5 * expected.item() + 0.5 * 0.25, rel=0.03)


def two_places(seen: Tensor) -> Render:
    """8 pixels; pixel i is at (i / 10, 0, 0) and covered if ``seen`` (8,) is true."""
    place = torch.zeros(1, 2, 4, 3)
    place[..., 0] = torch.arange(8.0).view(1, 2, 4) / 10
    alpha = seen.float().view(1, 2, 4, 1)
    return Render(rgb=place, opacity=alpha, depth=alpha, background=place, position=place)


def test_eikonal_points_are_at_every_visible_pixel_alike():
    seen = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    term = build("loss", "eikonal", points=8000, spread=0.0)
    points = term._points(two_places(seen), 1.0, torch.Generator().manual_seed(0))
    near = (points[:4000, 0] * 10).round().long()
    assert len(points) == 8000 and torch.equal(points[:4000, 1:], torch.zeros(4000, 2))
    counts = near.bincount(minlength=8)
    assert (counts[~seen] == 0).all() and ((counts[seen] - 1000).abs() < 5 * math.sqrt(750)).all()
    # All other points are uniform in the ball, where the mean of |x|^3 is 1/2.
    nothing = term._points(two_places(torch.zeros(8)), 1.0, torch.Generator().manual_seed(0))
    for uniform in (points[4000:], nothing):
        assert uniform.norm(dim=-1).pow(3).mean().item() == pytest.approx(0.5, abs=0.03)
        assert (uniform.norm(dim=-1) <= 1 + 1e-6).all()


def test_eikonal_does_not_wait_for_the_device():
    """The loss does not synchronize with the device: no boolean indexing, no item()."""
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._overloadpacket.__name__
            index = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
            by_booleans = any(part is not None and part.dtype == torch.bool for part in index)
            if by_booleans or name in {"nonzero", "masked_select", "_local_scalar_dense"}:
                waits.append(name)
            return function(*args, **(kwargs or {}))

    with Watch():
        build("loss", "eikonal")._points(two_places(torch.ones(8)), 1.0, torch.Generator().manual_seed(0))
    assert not waits


@pytest.mark.gpu
def test_eikonal_points_without_a_synchronisation():
    render = two_places(torch.ones(8))
    assert render.position is not None
    moved = replace(render, opacity=render.opacity.cuda(), position=render.position.cuda())
    term, generator = build("loss", "eikonal"), Rng()("eikonal", 0, "cuda")
    term._points(moved, 1.0, generator)  # initialize caches
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        points = term._points(moved, 1.0, generator)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert points.shape == (2048, 3)


def test_eikonal_trains_the_field():
    geometry = sphere()
    with torch.no_grad():
        geometry.network.weights[-1][0].fill_(0.3)
        geometry.table.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(0))
    term = build("loss", "eikonal")
    optimizer = torch.optim.Adam(geometry.parameters(), lr=0.01)
    values = []
    for step in range(40):
        loss = term(views(1.0, torch.tensor([0.5, 0.0, 0.0])), geometry, step, Rng())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.2 * values[0]


class Levels(Field):
    """A field with one extinction inside of a cube of half width ``half`` and another one outside."""

    def __init__(self, inside: float, outside: float, half: float) -> None:
        super().__init__(Field.Config())
        self.num_features, self.half = 3, half
        self.levels = nn.Parameter(torch.tensor([outside, inside]))

    def density(self, points: Tensor) -> Tensor:
        return self.levels[(points.abs().amax(-1) < self.half).long()]

    def forward(self, points: Tensor, *, with_normal: bool = False) -> GeometryOutput:
        return GeometryOutput(self.density(points), points)


@pytest.fixture
def cube(tmp_path) -> Loss:
    """The loss for a cube whose corners are at distance 0.6, with half width 0.6 / sqrt(3)."""
    trimesh.creation.box((1.0, 1.0, 1.0)).export(tmp_path / "cube.obj")
    return build("loss", "sketch-shape", mesh=str(tmp_path / "cube.obj"), size=0.6, sigma=0.1, points=20_000)


HALF = 0.6 / math.sqrt(3)


def test_sketch_shape_by_hand(cube):
    """Empty space costs 0 outside and -log(1e-5) inside; for dense space it is the reverse."""
    points, inside, weights = (getattr(cube._pool(1.0, 0, torch.device("cpu")), name) for name in POOL)
    assert torch.equal(inside, points.abs().amax(-1) < HALF) or (inside != (points.abs().amax(-1) < HALF)).sum() < 5
    beyond = points.abs() - HALF
    distance = beyond.clamp_min(0).norm(dim=-1) + beyond.amax(-1).clamp_max(0)
    torch.testing.assert_close(weights, 1 - torch.exp(-distance.square() / 0.02), atol=1e-4, rtol=0)
    assert (points.norm(dim=-1) <= 1.0 + 1e-6).all() and 0.2 < inside.float().mean() < 0.6
    for levels in ((40.0, 0.0), (0.0, 0.0), (3.0, 0.5)):
        geometry = Levels(*levels, HALF)
        depth = 0.2 * torch.tensor(levels)
        cost = torch.where(inside, -torch.log(-torch.expm1(-depth[0] - 1e-5)), depth[1])
        assert cube(views(1.0), geometry, 0, Rng()).item() == pytest.approx((weights * cost).mean().item(), rel=0.06)


POOL = ("points", "inside", "weights")


def test_sketch_shape_fills_the_inside_and_empties_the_outside(cube):
    geometry = Levels(1.0, 1.0, HALF)
    cube(views(1.0), geometry, 0, Rng()).backward()
    outside, inside = geometry.levels.grad
    assert outside > 0 > inside
    first, again, later = (cube(views(1.0), geometry, step, Rng()).item() for step in (0, 0, 1))
    assert first == again != later


def system(geometry: str, renderer: str, **losses):
    block = {"geometry": {"type": geometry}, "renderer": {"type": renderer}, "loss": losses}
    return parse_component("system", {"type": "text-to-3d", "guidance": {"type": "sds"}, **block})


def test_terms_are_checked_against_geometry_and_renderer():
    assert system("implicit-sdf", "neus-volume", eikonal=0.1, **{"z-variance": 1.0})
    with pytest.raises(
        ConfigError, match=r"loss.eikonal: the term is for a SignedDistanceField, which implicit-volume"
    ):
        system("implicit-volume", "volume", eikonal=0.1)
    assert system("implicit-volume", "volume", eikonal=0)
    with pytest.raises(ConfigError, match=r"renderer\.type: neus-volume cannot render implicit-volume; use volume"):
        system("implicit-volume", "neus-volume")


def test_a_field_without_what_a_term_needs_is_named(cube):
    with pytest.raises(ValueError, match="Levels has no signed distance"):
        build("loss", "eikonal")(views(1.0), Levels(1.0, 1.0, HALF), 0, Rng())
    with pytest.raises(ConfigError, match="mesh"):
        build("loss", "sketch-shape")
