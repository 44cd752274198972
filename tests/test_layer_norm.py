"""layer_norm: against torch's own, in every dtype, from its input and from its output; what it keeps; bad input."""

import pytest
import torch
import torch.nn.functional as F
from close import NEEDS_CUDA, assert_as_good, assert_close
from saved import saved, saved_bytes
from torch._subclasses import FakeTensorMode

from palp_fast import functional as PF

WIDTH = 24
KEEP = pytest.mark.parametrize("keep", ["input", "output"])


def parameters(dtype=torch.float32):
    """As trained ones: weights near 1, of either sign; biases below them."""
    draw = torch.Generator().manual_seed(0)
    weight = (0.5 + torch.rand(WIDTH, generator=draw)) * torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)
    return weight.to(dtype), (0.3 * torch.randn(WIDTH, generator=draw)).to(dtype)


def plain(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def with_gradient(function, x, grad, dtype):
    leaf = x.detach().requires_grad_()
    out = function(leaf, *parameters(dtype))
    return out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))


@KEEP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aligned", [False, True])
def test_values_and_gradient(aligned, dtype, keep):
    """aligned: a gradient along xhat, most of which xhat's own term takes away."""
    x = (2 * torch.randn(4, 7, WIDTH) + 1).to(dtype)
    grad = (plain(x.float(), *parameters()) if aligned else torch.zeros(x.shape)) + torch.randn(x.shape)
    grad = grad.to(dtype)
    made = with_gradient(lambda *given: PF.layer_norm(*given, keep=keep), x, grad, torch.float32)
    peer = with_gradient(plain, x, grad, dtype)
    truth = with_gradient(plain, x.double(), grad, torch.float64)
    for name, mine, its, true in zip(("output", "x"), made, peer, truth):
        assert mine.dtype == dtype
        assert_as_good(mine, its, true, 1e-6, name)


@KEEP
@pytest.mark.parametrize("given", [True, False])
def test_gradcheck(given, keep):
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    weight, bias = parameters(torch.float64) if given else (None, None)
    assert torch.autograd.gradcheck(lambda x: PF.layer_norm(x, weight, bias, keep=keep), x)


@KEEP
def test_strided_and_empty_input(keep):
    x = torch.randn(2, WIDTH, 3, 5).movedim(1, -1)
    y = PF.layer_norm(x, *parameters(), keep=keep)
    assert y.is_contiguous()
    assert_close(y, plain(x.double(), *parameters(torch.float64)), 1e-6)
    x = torch.empty(0, WIDTH, requires_grad=True)
    PF.layer_norm(x, keep=keep).sum().backward()
    assert x.grad.shape == (0, WIDTH)


@KEEP
def test_autocast_computes_in_fp32_and_returns_the_dtype_of_x(keep):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, WIDTH).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = PF.layer_norm(x, *parameters(), keep=keep)
            (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.dtype == dx.dtype == dtype
        wanted = PF.layer_norm(x, *parameters(), keep=keep)
        assert_close(y, wanted, 0.0)
        assert_close(dx, torch.autograd.grad(wanted.sum(), x)[0], 0.0)


@KEEP
def test_compiles_in_one_graph(keep):
    x, (weight, bias) = torch.randn(5, WIDTH, requires_grad=True), parameters()

    def twice(x):
        return 2 * PF.layer_norm(x, weight, bias, keep=keep)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), twice(x), 1e-6)
    assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(twice(x).sum(), x)[0], 1e-5)


@pytest.mark.parametrize(("tokens", "width"), [(4096, 320), (1024, 640), (256, 1280)])
def test_keeps_one_tensor(tokens, width):
    with FakeTensorMode():
        x = torch.empty(2, tokens, width, dtype=torch.float16, requires_grad=True)
        weight, bias, after = torch.empty(3, width, dtype=torch.float16)
        after = after.view(1, width).requires_grad_()  # a projection that is trained keeps its input

        def bytes_of(norm, projected=False):
            def both():
                return F.linear(norm(), after) if projected else norm()

            return saved_bytes(both, weight, bias, after)

        size, rows = 2 * x.numel(), 2 * tokens
        norms = {keep: lambda keep=keep: PF.layer_norm(x, weight, bias, keep=keep) for keep in ("input", "output")}
        assert bytes_of(norms["input"]) == size + 2 * 4 * rows
        assert bytes_of(norms["output"]) == size + 4 * rows
        # Followed by a trained layer: its input is the one tensor kept, where torch keeps two.
        assert bytes_of(norms["output"], projected=True) == size + 4 * rows
        assert bytes_of(lambda: plain(x, weight, bias), projected=True) > 2 * size


@NEEDS_CUDA
@KEEP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [320, 640, 1280])
def test_on_a_gpu(width, dtype, keep):
    x = (2 * torch.randn(300, width, device="cuda") + 1).to(dtype)
    weight, bias = (0.5 + torch.rand(2, width, device="cuda")).to(dtype)
    grad = torch.randn_like(x)

    def run(function, compute):
        leaf = x.detach().to(compute).requires_grad_()
        out = function(leaf, weight.to(compute), bias.to(compute))
        return out, *torch.autograd.grad(out, leaf, grad.to(compute))

    found = run(lambda *given: PF.layer_norm(*given, keep=keep), dtype)
    for name, *values in zip(("output", "x"), found, run(plain, dtype), run(plain, torch.float64)):
        assert_as_good(*values, 1e-5, name)


def test_keeps_its_own_tensors_and_no_copies():
    x = torch.randn(4, WIDTH, requires_grad=True)
    weight, bias = parameters()
    assert saved(lambda: PF.layer_norm(x, weight, bias), weight, bias)[0].data_ptr() == x.data_ptr()
    found = []
    kept = saved(lambda: found.append(PF.layer_norm(x, weight, bias, keep="output")), weight, bias)
    assert kept[0].data_ptr() == found[0].data_ptr()


def test_a_weight_of_zero_is_refused_where_it_can_be_read_and_nan_elsewhere():
    weight, bias = parameters()
    weight[3] = 0
    x = torch.randn(4, WIDTH, requires_grad=True)
    with pytest.raises(ValueError, match="weight has a 0"):
        PF.layer_norm(x, weight, bias, keep="output")
    PF.layer_norm(x, weight, bias).sum().backward()
    assert x.grad.isfinite().all()
    y, _, rstd = torch.ops.palp_fast.layer_norm(x, weight, bias, 1e-5, True)
    assert torch.ops.palp_fast.layer_norm_bwd(torch.ones_like(y), y, None, rstd, weight, bias).isnan().all()


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(())}, r"x has shape \[\]: allowed is \[..., d\]"),
    ({"x": torch.zeros(3, 0)}, r"x has shape \[3, 0\]"),
    ({"x": torch.zeros(3, WIDTH, dtype=torch.int64)}, "x has dtype"),
    ({"weight": torch.zeros(5)}, "weight has shape"),
    ({"bias": torch.zeros(WIDTH, device="meta")}, "bias is on meta"),
    ({"eps": "1"}, "eps"),
    ({"keep": "both"}, "keep='both': allowed are 'input' and 'output'"),
])
def test_bad_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PF.layer_norm(**{"x": torch.zeros(3, WIDTH), **change})


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve layer_norm on cpu"):
        PF.layer_norm(torch.zeros(3, WIDTH), backend="triton")
