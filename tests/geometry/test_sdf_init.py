"""Initial shapes: the same options give the same shape in every geometry with signed distances."""

import numpy as np
import pytest
import torch
from shared.surface_scenes import build, write_cube

from scoredist3d.config import ConfigError
from scoredist3d.config.validation import parse_component
from scoredist3d.geometry.sdf_init import ellipsoid_sdf

KINDS = {
    "implicit-sdf": {"shape_init_resolution": 48, "grid": {"num_levels": 2, "log2_hashmap_size": 6}},
    "dmtet": {"resolution": 16, "grid": {"num_levels": 2, "log2_hashmap_size": 6}},
    "flexicubes": {"resolution": 16, "grid": {"num_levels": 2, "log2_hashmap_size": 6}},
}


@pytest.mark.parametrize("shape", ["sphere", "ellipsoid", "mesh"])
@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_all_begin_with_the_same_distances(shape, radius, tmp_path):
    options = {"shape_init": shape, "radius": radius, "shape_init_axes": [0.7, 0.5, 0.3], "shape_init_size": 0.6}
    if shape == "mesh":
        options["shape_init_mesh"] = str(write_cube(tmp_path))
    field, *surfaces = (build("geometry", kind, **own, **options) for kind, own in KINDS.items())
    for surface in surfaces:
        inside = surface.vertices.norm(dim=-1) < 0.9 * radius
        with torch.no_grad():
            expected = field.sdf(surface.vertices[inside])
        torch.testing.assert_close(
            surface.sdf.detach()[inside], expected, atol=(0.03 if shape == "mesh" else 1e-5) * radius, rtol=0
        )
        assert (surface.signed_distances() == surface.sdf)[inside].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shape_init": "mesh"}, "shape_init: mesh needs a mesh file"),
        ({"shape_init_mesh": "a.obj"}, "a.obj is not used with shape_init: sphere"),
    ],
)
def test_a_file_is_needed_where_it_is_used(kind, options, said):
    with pytest.raises(ConfigError, match=f"shape_init_mesh: {said}"):
        parse_component("geometry", {"type": kind, **options})


def test_the_ellipsoid_s_formula():
    """Exact for a sphere, first order in general, and finite with finite gradients at the center."""
    points = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ellipsoid_sdf(points, (0.4, 0.4, 0.4)), points.norm(dim=-1) - 0.4)
    centre = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    value = ellipsoid_sdf(centre, (0.8, 0.5, 0.3))
    value.sum().backward()
    assert value.item() == pytest.approx(-0.3, rel=1e-5) and centre.grad.abs().max() == 0
    axes = np.array([0.8, 0.5, 0.3])
    surface = points / points.norm(dim=-1, keepdim=True) * torch.from_numpy(axes)
    outward = torch.nn.functional.normalize(surface / torch.from_numpy(axes) ** 2, dim=-1)
    torch.testing.assert_close(
        ellipsoid_sdf(surface + 1e-4 * outward, tuple(axes)), torch.full((100,), 1e-4).double(), atol=1e-6, rtol=0
    )
