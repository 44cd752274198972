"""layer_norm's kernels against the reference."""

import pytest
import torch
from close import assert_as_good, assert_close, cancellation

from palp_fast import functional as PF
from palp_fast.kernels import layer_norm
from palp_fast.kernels.layer_norm import Launch

ROWS = 4  # of a tile of 8 columns


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(layer_norm.LAUNCHES, "generic", Launch(TILE=8 * ROWS))


def run(x, grad, *, weight=True, keep, backend):
    x = x.detach().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    scale, shift = (torch.rand(x.shape[-1], generator=draw) + 0.5 for _ in range(2)) if weight else (None, None)
    y = PF.layer_norm(x, scale, shift, 1e-3, keep=keep, backend=backend)
    return y, *torch.autograd.grad(y, x, grad)


def assert_agree(x, **options):
    grad = torch.randn_like(x)
    found = run(x, grad, backend="triton", **options)
    peer = run(x, grad, backend="reference", **options)
    truth = run(x.double(), grad.double(), backend="reference", **options)
    floor = 1e-6 if x.dtype == torch.float32 else 1e-12
    # In short rows nearly all of the gradient cancels: what is left is only as exact as the terms were.
    terms = grad / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    floors = floor, floor * cancellation(terms, truth[1])
    for name, mine, its, true, allowed in zip(("output", "x"), found, peer, truth, floors):
        assert_as_good(mine, its, true, allowed, name)


@pytest.mark.parametrize("keep", ["input", "output"])
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1])
@pytest.mark.parametrize("width", [2, 5, 7, 8, 9])
def test_values_and_gradient(rows, width, keep):
    assert_agree(3 * torch.randn(rows, width) + 1, keep=keep)


@pytest.mark.parametrize("keep", ["input", "output"])
@pytest.mark.parametrize("weight", [False, True])
def test_fp64_without_weight(weight, keep):
    assert_agree(torch.randn(2, 3, 7, dtype=torch.float64), weight=weight, keep=keep)


@pytest.mark.parametrize("keep", ["input", "output"])
def test_strided_and_empty_input(keep):
    for x in (torch.randn(2, 6, 3, 5).movedim(1, -1), torch.randn(3, 12)[:, 2:9], torch.randn(6, 3, 5).transpose(0, 1)):
        assert_agree(x, keep=keep)
    x = torch.empty(0, 5, requires_grad=True)
    y = PF.layer_norm(x, keep=keep, backend="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 5)


def test_expanded_gradient():
    x = torch.randn(3, 7)
    found, wanted = (run(x, torch.ones(()).expand(3, 7), keep="input", backend=name)[1] for name in
                     ("triton", "reference"))
    assert_close(found, wanted, 1e-5)


def test_strided_weights():
    x, given = torch.randn(4, 7).requires_grad_(), torch.randn(7, 2).T
    found, wanted = (PF.layer_norm(x, *given, backend=backend) for backend in ("triton", "reference"))
    assert_close(found, wanted, 2e-6)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)), 1e-5)


def test_a_large_mean_does_not_cancel():
    x = torch.randn(3, 7) + 3000
    # Means are rounded to 1 / 4096. The difference of the mean square and the squared mean would be off by 1.
    assert_close(PF.layer_norm(x, backend="triton"), torch.nn.functional.layer_norm(x.double(), (7,)), 5e-4)


@pytest.mark.parametrize("keep", ["input", "output"])
def test_gradcheck(keep):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.rand(2, 5, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda x: PF.layer_norm(x, weight, bias, keep=keep, backend="triton"), x)
