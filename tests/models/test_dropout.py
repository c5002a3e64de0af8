"""Dropout on a CPU: the share, the scale, the gradient, the generator."""

import pytest
import torch

from detrkit.models.layers.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_and_the_mean_are_right(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1003)
    out = dropout(x, p)
    assert (out == 0).float().mean() == pytest.approx(p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-5)
    assert out.mean() == pytest.approx(1, abs=0.01)
    assert out.unique().numel() == 2
    assert (x == 1).all()


def test_elements_are_dropped_independently_of_each_other():
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(400_000), 0.5) == 0).double() - 0.5
    for distance in (1, 2, 3, 4, 8, 64):
        correlation = (dropped[distance:] * dropped[:-distance]).mean() / 0.25
        assert abs(correlation) < 5 / 400_000**0.5
    for lane in range(4):  # all four parts of a random number are even
        assert dropped[lane::4].mean() == pytest.approx(0, abs=0.008)


def test_the_gradient_is_that_of_the_elements_kept():
    torch.manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    scale = (out / x).max()
    torch.testing.assert_close(grad, 2 * out * scale)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, torch.where(out == 0, 0.0, 2 * scale**2))


def test_a_seed_repeats_it():
    x = torch.ones(3, 50)
    torch.manual_seed(1)
    first, other = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_stays(dtype):
    assert dropout(torch.ones(10, dtype=dtype), 0.5).dtype == dtype


def test_without_training_or_probability_nothing_happens():
    x = torch.randn(4)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert dropout(x, 1.0).eq(0).all()
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
