"""Conventions of scoredist3d.cameras against hand-computed values."""

import math

import pytest
import torch

from scoredist3d.cameras import Cameras, look_at, orbit, sphere_cameras

ROOT3, ROOT15 = math.sqrt(3.0), math.sqrt(1.5)


def one(azimuth: float, elevation: float, distance: float = 3.0, fovy: float = 90.0, size: int = 2) -> Cameras:
    return orbit(*(torch.tensor([value]) for value in (azimuth, elevation, distance, fovy)), size, size)


def random_cameras(count: int = 6, height: int = 5, width: int = 8) -> Cameras:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4, count, generator=generator, dtype=torch.float64)
    return orbit(360 * u[0] - 180, 160 * u[1] - 80, 1 + 3 * u[2], 20 + 60 * u[3], height, width)


def test_front_view_rays():
    """From +x, +y is on the right of the image; with fovy 90 and 2 pixels, pixel centers have offsets of 0.5."""
    rays = one(0.0, 0.0).rays()
    assert torch.equal(rays.origins[0, 0, 0], torch.tensor([3.0, 0.0, 0.0]))
    expected = torch.tensor(
        [[[-1.0, -0.5, 0.5], [-1.0, 0.5, 0.5]], [[-1.0, -0.5, -0.5], [-1.0, 0.5, -0.5]]]
    )  # rows from the top (+z), columns from -y to +y
    torch.testing.assert_close(rays.directions[0], expected / ROOT15)
    torch.testing.assert_close(rays.cosines, torch.full((1, 2, 2), 1 / ROOT15))


def test_centre_ray_looks_at_the_origin():
    centre = one(0.0, 0.0, size=1).rays().directions[0, 0, 0]
    torch.testing.assert_close(centre, torch.tensor([-1.0, 0.0, 0.0]))
    diagonal = one(45.0, math.degrees(math.atan(1 / math.sqrt(2.0))), ROOT3, size=1)  # the corner (1, 1, 1)
    torch.testing.assert_close(diagonal.origins[0], torch.ones(3))
    torch.testing.assert_close(diagonal.rays().directions[0, 0, 0], -torch.ones(3) / ROOT3)


@pytest.mark.parametrize(
    ("azimuth", "position", "right"),
    [
        (0.0, (3, 0, 0), (0, 1, 0)),
        (90.0, (0, 3, 0), (-1, 0, 0)),
        (180.0, (-3, 0, 0), (0, -1, 0)),
        (270.0, (0, -3, 0), (1, 0, 0)),
    ],
)
def test_azimuth_grows_counter_clockwise_from_above(azimuth, position, right):
    camera = one(azimuth, 0.0)
    torch.testing.assert_close(camera.origins[0], torch.tensor(position).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(camera.c2w[0, :3, 0], torch.tensor(right).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(camera.c2w[0, :3, 1], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6, rtol=0)


def test_azimuth_is_wrapped():
    torch.testing.assert_close(one(270.0, 0.0).azimuth, torch.tensor([-math.pi / 2]))
    torch.testing.assert_close(one(180.0, 0.0).azimuth, torch.tensor([-math.pi]))
    torch.testing.assert_close(one(-190.0, 0.0).azimuth, torch.tensor([math.radians(170.0)]))


@pytest.mark.parametrize("azimuth", [0.0, 30.0, 90.0, -120.0])
@pytest.mark.parametrize("pole", [90.0, -90.0])
def test_poles_are_the_limit_of_nearby_elevations(azimuth, pole):
    at, near = one(azimuth, pole), one(azimuth, pole * (1 - 1e-3))
    torch.testing.assert_close(at.c2w, near.c2w, atol=6e-3, rtol=0)  # 0.09 degrees apart at distance 3
    rotation = at.c2w[0, :3, :3]
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), atol=1e-5, rtol=0)


def test_look_at_along_up_has_a_documented_image_up():
    up = torch.tensor([[0.0, 0.0, 1.0]])
    above = look_at(torch.tensor([[0.0, 0.0, 2.0]]), torch.zeros(1, 3), up)
    below = look_at(torch.tensor([[0.0, 0.0, -2.0]]), torch.zeros(1, 3), up)
    assert torch.equal(above[0, :3, 1], torch.tensor([-1.0, 0.0, 0.0]))
    assert torch.equal(below[0, :3, 1], torch.tensor([1.0, 0.0, 0.0]))


def test_c2w_is_a_right_handed_rigid_motion_and_w2c_its_inverse():
    cameras = random_cameras()
    rotation = cameras.c2w[:, :3, :3]
    identity = torch.eye(3, dtype=torch.float64).expand(len(cameras), 3, 3)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(len(cameras), dtype=torch.float64))
    torch.testing.assert_close(cameras.w2c @ cameras.c2w, torch.eye(4, dtype=torch.float64).expand(len(cameras), 4, 4))


def test_projection_agrees_with_rays():
    """A point on the ray of pixel (i, j) projects to the center of that pixel with its z-depth."""
    cameras = random_cameras()
    rays, near, far = cameras.rays(), 0.5, 20.0
    distance = 2.5
    points = rays.origins + distance * rays.directions
    ones = torch.ones_like(points[..., :1])
    view_projection = cameras.projection(near, far) @ cameras.w2c
    clip = torch.einsum("bij,bhwj->bhwi", view_projection, torch.cat([points, ones], dim=-1))
    ndc = clip[..., :3] / clip[..., 3:]
    columns = (torch.arange(cameras.width, dtype=torch.float64) + 0.5) / cameras.width * 2 - 1
    rows = 1 - (torch.arange(cameras.height, dtype=torch.float64) + 0.5) / cameras.height * 2
    torch.testing.assert_close(ndc[..., 0], columns[None, None, :].expand_as(ndc[..., 0]))
    torch.testing.assert_close(ndc[..., 1], rows[None, :, None].expand_as(ndc[..., 1]))
    depth = distance * rays.cosines
    torch.testing.assert_close(clip[..., 3], depth)
    torch.testing.assert_close(ndc[..., 2], (far + near) / (far - near) - 2 * far * near / (far - near) / depth)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_rays_and_matrices(half):
    """Rays are bit-equal under autocast; in half precision, they would be off by several pixels at a size of 512."""
    cameras = orbit(*(torch.tensor([value, value + 1.5]) for value in (33.0, 20.0, 2.7, 45.0)), 64, 64)

    def everything() -> list[torch.Tensor]:
        rays = cameras.rays()
        return [rays.origins, rays.directions, rays.cosines, cameras.w2c, cameras.projection()]

    expected = everything()
    with torch.autocast("cpu", half):
        found = everything()
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype and torch.equal(value, wanted)


def test_rays_of_many_cameras_are_unit_and_rotated():
    """directions = R (x / f, y / f, -1) / norm, with R a matrix product in float64."""
    cameras = random_cameras()
    rays, focal = cameras.rays(), 2.5 / torch.tan(cameras.fovy / 2)
    row, column = 1, 6
    local = torch.stack([2.5 / focal, 1.0 / focal, -torch.ones_like(focal)], dim=-1)
    world = (cameras.c2w[:, :3, :3] @ local[..., None])[..., 0]
    expected = world / world.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rays.directions[:, row, column], expected)
    torch.testing.assert_close(rays.cosines[:, row, column], 1 / local.norm(dim=-1))
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones_like(rays.cosines))


def test_fovy_spans_the_height():
    camera = one(0.0, 0.0, fovy=60.0, size=1001)
    directions = camera.rays().directions[0, :, 500]
    angle = torch.acos((directions[0] * directions[-1]).sum())
    torch.testing.assert_close(
        math.degrees(angle), 60.0, atol=0.1, rtol=0
    )  # one pixel less than the whole image height


def test_offset_target_and_up_move_the_camera():
    angles = [torch.tensor([value]) for value in (0.0, 0.0, 3.0, 40.0)]
    moved = orbit(*angles, 1, 1, offset=torch.tensor([[0.0, 0.0, 1.0]]), target=torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(moved.origins, torch.tensor([[3.0, 0.0, 1.0]]))
    torch.testing.assert_close(moved.rays().directions[0, 0, 0], torch.tensor([-1.0, 0.0, 0.0]))
    rolled = orbit(*angles, 1, 1, up=torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(rolled.c2w[0, :3, 1], torch.tensor([0.0, 1.0, 0.0]))


def test_selection_and_joining_keep_the_batch_dimension():
    cameras = random_cameras(4)
    assert len(cameras[-1]) == 1 and torch.equal(cameras[-1].c2w[0], cameras.c2w[3])
    joined = Cameras.cat([cameras[:1], cameras[1:]])
    assert torch.equal(joined.c2w, cameras.c2w) and torch.equal(joined.distance, cameras.distance)
    with pytest.raises(ValueError, match="must have one image size"):
        Cameras.cat([cameras, cameras.with_size(3, 3)])


def test_shapes_are_checked():
    cameras = random_cameras(2)
    with pytest.raises(ValueError, match=r"fovy must be \(2,\), got \(1,\)"):
        Cameras(cameras.c2w, cameras.fovy[:1], cameras.azimuth, cameras.elevation, cameras.distance, 4, 4)


def test_cameras_see_all_sides_and_a_turn_gives_others() -> None:
    cameras = sphere_cameras(200, distance=2.0, fovy_deg=40.0, size=8)
    assert cameras.origins.norm(dim=-1).tolist() == pytest.approx([2.0] * 200, rel=1e-5)
    assert cameras.origins.mean(0).norm() < 0.02
    spread = cameras.origins.T @ cameras.origins / 200
    torch.testing.assert_close(spread, 4 / 3 * torch.eye(3), atol=0.05, rtol=0)
    other = sphere_cameras(200, distance=2.0, fovy_deg=40.0, size=8, turn=0.5)
    assert (cameras.origins - other.origins).norm(dim=-1).min() > 0.05


def test_cameras_from_poses_are_those_of_an_orbit():
    expected = random_cameras(40)
    found = Cameras.from_poses(expected.c2w, expected.fovy, 5, 8)
    for name in ("c2w", "fovy", "azimuth", "elevation", "distance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-12)
    assert (found.height, found.width) == (5, 8)


def test_angles_of_poses_at_the_ends_of_their_ranges():
    """The azimuth of the back view is -pi, not pi; straight above, the elevation is pi / 2."""
    c2w = torch.eye(4).repeat(3, 1, 1)
    c2w[:, :3, 3] = torch.tensor([[-2.0, 0.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, -3.0]])
    found = Cameras.from_poses(c2w, torch.ones(3), 2, 2)
    torch.testing.assert_close(found.azimuth[0], torch.tensor(-math.pi))
    torch.testing.assert_close(found.elevation, torch.tensor([0.0, math.pi / 2, -math.pi / 2]))
    torch.testing.assert_close(found.distance, torch.tensor([2.0, 3.0, 3.0]))
