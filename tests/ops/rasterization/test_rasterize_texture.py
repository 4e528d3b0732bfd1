"""Texture sampling: known values, an independent bilinear reference, gradients."""

import pytest
import torch

from scoredist3d.ops import native
from scoredist3d.ops.rasterization.rasterize import sample_texture

needs_native = pytest.mark.skipif(not native.available(), reason=f"no C kernels: {native.unavailable_reason()}")
CPU_BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


def texel_centers(height: int, width: int) -> torch.Tensor:
    """Coordinates (Ht, Wt, 2) of the texel centers, top row (v near 1) first."""
    u = (torch.arange(width) + 0.5) / width
    v = 1 - (torch.arange(height) + 0.5) / height
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("filter", ["linear", "nearest"])
@pytest.mark.parametrize("wrap", ["repeat", "clamp"])
def test_texel_centers_give_the_texels(filter, wrap, backend):
    texture = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    found = sample_texture(texture, texel_centers(3, 5), filter=filter, wrap=wrap, backend=backend)
    torch.testing.assert_close(found, texture)


def test_origin_is_at_the_bottom_left():
    texture = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[..., None]
    corners = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.9]])
    assert sample_texture(texture, corners, filter="nearest")[:, 0].tolist() == [2, 3, 0, 1]


def test_linear_clamped_equals_grid_sample():
    generator = torch.Generator().manual_seed(1)
    texture = torch.rand(2, 6, 7, 3, generator=generator, dtype=torch.float64)
    uv = torch.rand(2, 8, 9, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    grid = torch.stack((2 * uv[..., 0] - 1, 1 - 2 * uv[..., 1]), dim=-1)
    expected = torch.nn.functional.grid_sample(
        texture.permute(0, 3, 1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(sample_texture(texture, uv, wrap="clamp"), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("filter", ["linear", "nearest"])
def test_repeat_has_period_one(filter):
    generator = torch.Generator().manual_seed(2)
    texture = torch.rand(4, 6, 2, generator=generator, dtype=torch.float64)
    uv = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    tiled = sample_texture(texture.repeat(3, 3, 1), (uv + 1) / 3, filter=filter)
    for shift in ((0, 0), (1, 0), (-3, 2)):
        found = sample_texture(texture, uv + torch.tensor(shift), filter=filter)
        torch.testing.assert_close(found, tiled)


@pytest.mark.parametrize("wrap", ["repeat", "clamp"])
def test_gradients_against_finite_differences(wrap):
    generator = torch.Generator().manual_seed(3)
    texture = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    uv = (torch.rand(15, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, x: sample_texture(t, x, wrap=wrap), (texture, uv), eps=1e-7, atol=1e-6)
    assert torch.autograd.gradcheck(lambda t: sample_texture(t, uv.detach(), filter="nearest", wrap=wrap), (texture,))


@needs_native
def test_native_equals_torch():
    generator = torch.Generator().manual_seed(4)
    texture, uv = torch.rand(2, 8, 9, 3, generator=generator), torch.rand(2, 200, 2, generator=generator) * 3 - 1
    results = []
    for backend in ("native", "torch"):
        t, x = texture.clone().requires_grad_(), uv.clone().requires_grad_()
        out = sample_texture(t, x, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (t, x))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_errors():
    texture, uv = torch.zeros(2, 2, 1), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="got 'cubic' and 'repeat'"):
        sample_texture(texture, uv, filter="cubic")
    with pytest.raises(ValueError, match="or both with a batch"):
        sample_texture(texture.expand(4, 2, 2, 1), uv)
    with pytest.raises(ValueError, match=r"uv must be \(..., 2\)"):
        sample_texture(texture, torch.zeros(3, 3))
