"""geglu: against torch's own, in every dtype; what it keeps; bad input."""

from functools import partial

import pytest
import torch
from close import BACKENDS, NEEDS_LIBRARY, assert_as_good, assert_close
from saved import saved_bytes
from torch._subclasses import FakeTensorMode

from palp_fast import functional as PF


def plain(x):
    h, g = x.chunk(2, dim=-1)
    return h * torch.nn.functional.gelu(g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradient(backend, dtype):
    x, grad = (3 * torch.randn(4, 7, 24)).to(dtype), torch.randn(4, 7, 12).to(dtype)
    results = []
    for function, values in ((partial(PF.geglu, backend=backend), x), (plain, x), (plain, x.double())):
        leaf = values.detach().requires_grad_()
        out = function(leaf)
        results.append((out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))))
    assert results[0][0].dtype == dtype
    for name, mine, peer, truth in zip(("output", "x"), *results):
        assert_as_good(mine, peer, truth, 1e-6, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(PF.geglu, backend=backend), x)


@NEEDS_LIBRARY
def test_compiled_version_over_all_that_counts_of_gelu():
    g = torch.cat([torch.linspace(-30, 30, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])]).requires_grad_()
    h = torch.ones_like(g)
    made = PF.geglu(torch.cat([h, g]), backend="cpu")
    wide = g.detach().double().requires_grad_()
    true = torch.nn.functional.gelu(wide)
    assert ((made - true).abs() <= 3e-7 * (1 + wide.abs())).all()
    (slope,), (true_slope,) = torch.autograd.grad(made.sum(), g), torch.autograd.grad(true.sum(), wide)
    assert (slope - true_slope).abs().max() <= 1e-6
    assert PF.geglu(torch.tensor([1.0, float("nan")]), backend="cpu").isnan().all()


@NEEDS_LIBRARY
def test_compiled_version_takes_any_strides_and_sizes():
    x = torch.randn(3, 5, 14).mT.contiguous().mT
    assert_close(PF.geglu(x, backend="cpu"), PF.geglu(x, backend="reference"), 1e-6)
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(PF.geglu(leaf, backend="cpu").sum(), leaf)  # a gradient of stride 0
    assert_close(dx, torch.autograd.grad(PF.geglu(leaf, backend="reference").sum(), leaf)[0], 1e-6)
    for shape in ((0, 4), (3, 0), (2,), (1, 2050)):
        made = PF.geglu(torch.ones(shape), backend="cpu")
        assert made.shape == (*shape[:-1], shape[-1] // 2)
        assert_close(made, PF.geglu(torch.ones(shape), backend="reference"), 1e-6)


def test_keeps_its_input_alone():
    x, kept = torch.randn(4, 24, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        PF.geglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


@pytest.mark.parametrize(("tokens", "width"), [(4096, 1280), (1024, 2560), (256, 5120)])
def test_keeps_two_thirds_of_what_torch_keeps(tokens, width):
    with FakeTensorMode():
        x = torch.empty(2, tokens, 2 * width, dtype=torch.float16, requires_grad=True)
        assert saved_bytes(lambda: PF.geglu(x)) == 2 * x.numel()
        assert saved_bytes(lambda: plain(x)) == 3 * x.numel()  # and the gelu


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"x has shape \[4, 5\]: allowed is \[..., 2 d\]"):
        PF.geglu(torch.zeros(4, 5))
    with pytest.raises(TypeError, match="x has dtype torch.int64"):
        PF.geglu(torch.zeros(4, 6, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve geglu on cpu"):
        PF.geglu(torch.zeros(4, 6), backend="triton")
