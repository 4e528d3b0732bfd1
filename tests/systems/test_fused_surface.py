"""The surface that is fused from renders of a density field: position, closure, transparency and settings."""

import math

import pytest
import torch
from shared.volume_scenes import build

from scoredist3d.cameras import Cameras
from scoredist3d.meshes.isosurface_extraction import find_surface
from scoredist3d.meshes.mesh import topology
from scoredist3d.meshes.quality import dihedrals
from scoredist3d.systems.fused_surface import DepthViews, fused_surface

RADIUS, BALL = 1.5, 0.8


class NoisyBall:
    """A ball whose density is noise, so that its iso-surfaces are crumpled, but whose renders show a ball."""

    radius, device, iso_level = RADIUS, torch.device("cpu"), None

    def __init__(self, opacity: float = 1.0, softness: float = 0.0) -> None:
        self.opacity, self.softness = opacity, softness

    def surface(self):
        return None

    def density(self, points):
        noise = torch.sin(37.0 * points).prod(-1).abs()
        return torch.where(points.norm(dim=-1) < BALL, 1.0 + 60.0 * noise, 0.0)

    def views(self, cameras: Cameras) -> DepthViews:
        rays = cameras.rays()
        along = -(rays.origins * rays.directions).sum(-1)
        discriminant = along**2 - (rays.origins**2).sum(-1) + BALL**2
        hit = (discriminant > 0)[..., None].float()
        depth = (along - discriminant.clamp_min(0).sqrt())[..., None] + self.softness
        return DepthViews(depth * hit, torch.full_like(hit, self.softness**2), self.opacity * hit)

    def fused_surface(self, resolution):
        return fused_surface(self.views, self.radius, self.device, resolution)


# Mean and standard deviation of the depth behind the surface of a homogeneous medium are both ``softness``.
@pytest.mark.parametrize("softness", [0.0, 0.1])
def test_the_surface_is_that_of_the_renders(softness: float):
    found = find_surface(NoisyBall(softness=softness), 48)
    radii = torch.from_numpy(found.mesh.vertices).norm(dim=-1)
    spacing = 2 * RADIUS / 47
    assert (radii.mean() - BALL).abs() < 0.3 * spacing and radii.std() < 0.2 * spacing
    assert found.mesh.volume == pytest.approx(4 / 3 * math.pi * BALL**3, rel=0.05)
    closed = topology(found.mesh)
    assert closed.watertight and closed.components == 1
    assert found.threshold is None and found.density_range is not None
    assert found.density_range[0] == 0.0 and 30.0 < found.density_range[1] < 61.1


def test_a_given_density_uses_the_field():
    crumpled = find_surface(NoisyBall(), 48, threshold=20.0)
    assert crumpled.threshold == 20.0
    assert dihedrals(crumpled.mesh).mean_deg > 3 * dihedrals(find_surface(NoisyBall(), 48).mesh).mean_deg


def test_a_transparent_object_falls_back_to_the_density():
    assert NoisyBall(opacity=0.4).fused_surface(16) is None
    assert NoisyBall(opacity=0.6).fused_surface(16) is not None
    assert find_surface(NoisyBall(opacity=0.4), 32).threshold is not None


def test_an_object_that_the_grid_does_not_resolve_falls_back_to_the_density(monkeypatch: pytest.MonkeyPatch):
    assert NoisyBall().fused_surface(24) is not None
    monkeypatch.setattr(f"{__name__}.BALL", 0.05)
    assert NoisyBall().fused_surface(24) is None


def test_the_fused_density_is_1_on_the_surface_and_0_outside_of_the_ball():
    fused = NoisyBall().fused_surface(64)
    points = torch.tensor([[BALL, 0, 0], [0, 0, 0], [1.2, 0, 0], [0, 0, 1.6]])
    density = fused.density(points)
    assert fused.iso_level == 1.0 and fused.surface() is None and fused.device == torch.device("cpu")
    assert 0.2 < density[0] < 5.0 and density[1] > 100.0 and density[2] < 0.01 and density[3] == 0.0


def test_scenes_without_a_surface_are_fused_and_others_are_not():
    assert build("geometry", "implicit-volume").iso_level is None
    assert build("geometry", "implicit-sdf").iso_level is not None
