"""Color transfer functions against the values of the standard, and the clamp with one-sided gradient."""

import pytest
import torch

from scoredist3d.ops.shading.color import clamp_unit, linear_to_srgb, srgb_to_linear


def test_curve_at_known_values():
    display = torch.tensor([0.0, 0.04045, 0.5, 1.0], dtype=torch.float64)
    linear = torch.tensor([0.0, 0.0031308, 0.2140411, 1.0], dtype=torch.float64)
    torch.testing.assert_close(srgb_to_linear(display), linear, atol=2e-7, rtol=0)
    torch.testing.assert_close(linear_to_srgb(linear), display, atol=2e-6, rtol=0)


def test_round_trip_of_every_byte():
    bytes_ = torch.arange(256) / 255.0
    torch.testing.assert_close(linear_to_srgb(srgb_to_linear(bytes_)), bytes_, atol=1e-6, rtol=0)


@pytest.mark.parametrize("curve", [srgb_to_linear, linear_to_srgb])
def test_slope_is_right_and_finite_from_black_to_white(curve):
    inside = torch.tensor([0.001, 0.002, 0.1, 0.7, 0.99], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(curve, inside)
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    curve(ends).sum().backward()
    assert ends.grad.isfinite().all() and (ends.grad > 0).all()


def test_clamp_passes_the_gradient_that_leads_back_and_no_other():
    x = torch.tensor([-1.0, -1.0, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    y = clamp_unit(x)
    assert y.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    y.backward(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]))
    # Descent on a positive gradient makes x smaller.
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -1.0, 1.0, 0.0]
