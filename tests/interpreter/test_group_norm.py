"""group_norm_silu's kernels against the reference: one pass and two, at every edge of their tiles."""

import pytest
import torch
from close import assert_as_good, assert_close, cancellation

from palp_fast import functional as PF
from palp_fast.kernels import group_norm_tile
from palp_fast.kernels.group_norm_tile import Launch
from palp_fast.reference.layout import channels_last

ONE_PASS = Launch()
TWO_PASSES = Launch(ON_CHIP=1, TILE=32, ROW=16, CHUNKS=4)  # channels-last: 2 pixels of 4 groups, chunks of 2 tiles


def run(x, groups, *, weight=True, silu=True, backend, grad):
    x = x.detach().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    scale, shift = (torch.randn(x.shape[1], generator=draw) for _ in range(2)) if weight else (None, None)
    y = PF.group_norm_silu(x, groups, scale, shift, 1e-3, silu=silu, backend=backend)
    return y, *torch.autograd.grad(y, x, grad)


def assert_agree(x, groups, **options):
    grad = torch.randn_like(x)
    found = run(x, groups, backend="triton", grad=grad, **options)
    peer = run(x, groups, backend="reference", grad=grad, **options)
    truth = run(x.double(), groups, backend="reference", grad=grad.double(), **options)
    floor = 1e-6 if x.dtype == torch.float32 else 1e-12
    # In small groups nearly all of the gradient cancels: what is left is only as exact as the terms were.
    variance = x.reshape(len(x), groups, -1).var(-1, correction=0, keepdim=True)
    terms = grad.reshape(len(x), groups, -1) / (variance + 1e-3).sqrt()
    floors = floor, floor * cancellation(terms, truth[1])
    for name, mine, its, true, allowed in zip(("output", "x"), found, peer, truth, floors):
        assert channels_last(mine) == channels_last(its), name
        assert_as_good(mine, its, true, allowed, name)


@pytest.fixture(params=[ONE_PASS, TWO_PASSES], ids=["one pass", "two passes"])
def passes(request, monkeypatch):
    monkeypatch.setitem(group_norm_tile.LAUNCHES, "generic", request.param)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("groups", "width", "pixels"), [
    (1, 1, (1, 2)), (3, 1, (1, 3)), (4, 3, (2, 2)), (5, 4, (3, 3)), (3, 5, (1, 15)), (1, 6, (4, 4)), (2, 10, (1, 17)),
])
def test_values_and_gradient(groups, width, pixels, last, passes):
    x = 3 * torch.randn(2, groups * width, *pixels) + 1
    assert_agree(x.to(memory_format=torch.channels_last) if last else x, groups)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("weight", [False, True])
def test_fp64_without_weight_and_without_silu(weight, silu, passes):
    assert_agree(torch.randn(2, 6, 3, 5, dtype=torch.float64), 3, weight=weight, silu=silu)


def test_other_layouts(passes):
    wide = torch.randn(2, 12, 3, 5).to(memory_format=torch.channels_last)
    for x in (
        wide[:, 2:8],  # of a concatenation
        wide[:, :, 1:],
        wide.transpose(2, 3),
        torch.randn(4, 6, 3, 5)[::2],
        torch.randn(2, 7, 6).transpose(1, 2),  # [B, C, N] as diffusers' attention has it
        torch.randn(2, 6, 7),
        torch.randn(2, 6),
        torch.randn(2, 1, 3, 5).expand(2, 6, 3, 5),
    ):
        assert_agree(x, 3)


def test_gradient_of_another_layout(passes):
    x, grad = torch.randn(2, 6, 3, 5).to(memory_format=torch.channels_last), torch.randn(2, 6, 3, 5)
    assert not channels_last(grad)
    for gradient in (grad, torch.ones(()).expand(2, 6, 3, 5)):
        found, wanted = (run(x, 3, backend=backend, grad=gradient)[1] for backend in ("triton", "reference"))
        assert_close(found, wanted, 2e-6)


def test_strided_weights(passes):
    x, given = torch.randn(2, 6, 3, 5).requires_grad_(), torch.randn(6, 2).T
    found, wanted = (PF.group_norm_silu(x, 3, *given, backend=backend) for backend in ("triton", "reference"))
    assert_close(found, wanted, 2e-6)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)), 1e-5)


@pytest.mark.filterwarnings("ignore:overflow")  # in elements masked off
def test_a_large_mean_does_not_cancel(passes):
    x = torch.randn(2, 6, 4, 5) + 3000
    found = PF.group_norm_silu(x, 3, silu=False, backend="triton")
    # Means are rounded to 1 / 4096. The difference of the mean square and the squared mean would be off by 1.
    assert_close(found, torch.nn.functional.group_norm(x.double(), 3), 5e-4)


@pytest.mark.filterwarnings("ignore:overflow")
def test_groups_of_one_element(passes):
    x, bias = torch.randn(2, 3, 1, 1, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    y = PF.group_norm_silu(x, 3, torch.ones(3), bias, backend="triton")
    y.sum().backward()
    assert_close(y, torch.nn.functional.silu(bias).view(1, 3, 1, 1).expand(2, 3, 1, 1), 1e-6)
    assert x.grad.abs().max() < 1e-3  # the rest of rstd = 300 times what cancels


def test_a_sample_does_not_depend_on_its_batch(passes):
    x = torch.randn(3, 6, 4, 5)
    assert torch.equal(PF.group_norm_silu(x, 3, backend="triton")[1:2],
                       PF.group_norm_silu(x[1:2], 3, backend="triton"))


def test_empty_input():
    for shape in ((0, 6, 2, 2), (2, 6, 0, 2)):
        x = torch.empty(shape, requires_grad=True)
        y = PF.group_norm_silu(x, 3, backend="triton")
        y.sum().backward()
        assert y.shape == x.grad.shape == shape


def test_gradcheck(passes):
    x = torch.randn(1, 4, 3, 1, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: PF.group_norm_silu(x, 2, weight, bias, backend="triton"), x)
