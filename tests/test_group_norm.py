"""group_norm_silu: against torch's own, in every dtype and layout; what it keeps; autocast; bad input."""

import functools

import pytest
import torch
import torch.nn.functional as F
from close import BACKENDS, NEEDS_CUDA, NEEDS_LIBRARY, assert_as_good, assert_close
from saved import saved_bytes
from torch._subclasses import FakeTensorMode

from palp_fast import functional as PF

GROUPS, SHAPE = 3, (2, 6, 4, 5)
SIZES = [(320, 64), (640, 32), (1280, 16), (2560, 8)]  # of SD1.x
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "slice of channels": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, :6],
    "slice of rows": lambda x: torch.cat([x, x], 2)[:, :, 1:5],
    "tokens": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
}


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE[1], generator=draw).to(dtype) for _ in range(2)]


def plain(x, groups, weight, bias, eps=1e-5, *, silu=True):
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def with_gradient(function, x, grad, dtype, **options):
    leaf = x.detach().requires_grad_()
    out = function(leaf, GROUPS, *parameters(dtype), 1e-5, **options)
    return out, *torch.autograd.grad(out, leaf, grad.to(out.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradient(backend, silu, dtype, layout):
    x = LAYOUTS[layout]((2 * torch.randn(SHAPE) + 1).to(dtype))
    grad = torch.randn_like(x)
    made = with_gradient(PF.group_norm_silu, x, grad, torch.float32, silu=silu, backend=backend)
    peer = with_gradient(plain, x, grad, dtype, silu=silu)
    truth = with_gradient(plain, x.double(), grad, torch.float64, silu=silu)
    for name, mine, its, true in zip(("output", "x"), made, peer, truth):
        assert mine.dtype == dtype and mine.stride() == torch.empty_like(x).stride(), name
        assert_as_good(mine, its, true, 1e-6, name)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, given, silu):
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    weight, bias = parameters(torch.float64) if given else (None, None)
    norm = functools.partial(PF.group_norm_silu, num_groups=GROUPS, weight=weight, bias=bias, backend=backend)
    assert torch.autograd.gradcheck(lambda x: norm(x, silu=silu), x)


@NEEDS_LIBRARY
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("groups", "shape"), [
    (32, (2, 320, 9, 7)), (16, (3, 192, 4, 4)), (1, (2, 300, 5, 3)), (30, (1, 30, 5, 2)), (4, (2, 20, 3, 4, 5)),
    (5, (2, 20, 130)), (4, (2, 20))])
def test_compiled_version_has_the_reference_values(groups, shape, last):
    if last and len(shape) > 2:
        x = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    else:
        x = torch.randn(shape)
    weight, bias = torch.randn(2, shape[1])
    grads = torch.randn(shape), torch.randn_like(x), torch.randn(()).expand(shape)
    for grad in grads:  # of other layouts than x, too
        results = []
        for backend in ("cpu", "reference"):
            leaf = (x + 1).requires_grad_()
            out = PF.group_norm_silu(leaf, groups, weight, bias, backend=backend)
            results.append((out, *torch.autograd.grad(out, leaf, grad)))
        for mine, its in zip(*results):
            assert mine.stride() == its.stride()
            assert_close(mine, its, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_without_pixels_and_empty_ones(backend):
    for shape in ((2, 6), (0, 6, 2, 2), (2, 6, 0, 2)):
        x = torch.randn(shape, requires_grad=True)
        y = PF.group_norm_silu(x, GROUPS, backend=backend)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape and y.isfinite().all()


def test_frozen_parameters_get_no_gradient():
    x, (weight, bias) = torch.randn(SHAPE, requires_grad=True), parameters()
    PF.group_norm_silu(x, GROUPS, weight.requires_grad_(), bias.requires_grad_()).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


def test_autocast_computes_in_fp32_and_returns_the_dtype_of_x():
    weight, bias = parameters()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SHAPE).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = PF.group_norm_silu(x, GROUPS, weight, bias)
            (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.dtype == dx.dtype == dtype
        wanted = PF.group_norm_silu(x, GROUPS, weight, bias)
        assert_close(y, wanted, 0.0)
        assert_close(dx, torch.autograd.grad(wanted.sum(), x)[0], 0.0)


def test_compiles_in_one_graph():
    x, (weight, bias) = torch.randn(SHAPE, requires_grad=True), parameters()

    def twice(x):
        return 2 * PF.group_norm_silu(x, GROUPS, weight, bias)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), twice(x), 1e-6)
    assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(twice(x).sum(), x)[0], 1e-6)


@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_keeps_its_input_and_statistics_alone(channels, size):
    with FakeTensorMode():
        x = torch.empty(2, channels, size, size, dtype=torch.float16, requires_grad=True)
        weight, bias = torch.empty(2, channels, dtype=torch.float16)
        mine = saved_bytes(lambda: PF.group_norm_silu(x, 32, weight, bias), weight, bias)
        torchs = saved_bytes(lambda: plain(x, 32, weight, bias), weight, bias)
    assert mine == 2 * x.numel() + 2 * 4 * 2 * 32
    assert torchs > 2 * 2 * x.numel()  # and what SiLU takes


@NEEDS_LIBRARY
def test_a_mean_of_ten_standard_deviations_costs_no_digits_of_channels_last():
    x = torch.randn(2, 32, 16, 16).to(memory_format=torch.channels_last) + 10
    assert_close(PF.group_norm_silu(x, 4, silu=False), F.group_norm(x.double(), 4), 1e-6)


@NEEDS_LIBRARY
def test_silu_of_large_and_missing_numbers():
    x = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 1e4]).view(1, 1, 6, 1)
    weight, bias = torch.tensor([1.0]), torch.tensor([0.0])
    made = torch.ops.palp_fast.group_norm_silu_bwd(  # silu' where statistics do nothing but pass x on
        torch.ones_like(x), x, torch.zeros(1, 1), torch.ones(1, 1), weight, bias, True)
    assert made.isfinite().all()
    y = PF.group_norm_silu(x, 1, weight * 1e3, bias)
    assert_close(y, F.silu(F.group_norm(x.double(), 1, weight.double() * 1e3, bias.double())), 1e-6)
    x[0, 0, 0] = float("nan")
    assert PF.group_norm_silu(x, 1).isnan().all()


@NEEDS_CUDA
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "size"), SIZES)
def test_on_a_gpu(channels, size, dtype, last):
    x = (2 * torch.randn(2, channels, size, size, device="cuda") + 1).to(dtype)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    weight, bias = torch.randn(2, channels, device="cuda", dtype=dtype)
    grad = torch.randn_like(x)

    def run(function, compute):
        leaf = x.detach().to(compute).requires_grad_()
        out = function(leaf, 32, weight.to(compute), bias.to(compute))
        return out, *torch.autograd.grad(out, leaf, grad.to(compute))

    found, again = run(PF.group_norm_silu, dtype), run(PF.group_norm_silu, dtype)
    for name, *values in zip(("output", "x"), found, run(plain, dtype), run(plain, torch.float64)):
        assert_as_good(*values, 1e-6, name)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(6)}, r"x has shape \[6\]"),
    ({"x": torch.zeros(2, 7, 3)}, r"x has shape \[2, 7, 3\]: allowed is \[B, C, ...\], C a multiple of num_groups=3"),
    ({"x": torch.zeros(SHAPE, dtype=torch.int64)}, "x has dtype"),
    ({"num_groups": 0}, "num_groups=0"),
    ({"num_groups": 1.5}, "num_groups=1.5"),
    ({"weight": torch.zeros(5)}, "weight has shape"),
    ({"bias": torch.zeros(6, device="meta")}, "bias is on meta"),
    ({"eps": float("nan")}, "eps"),
    ({"silu": 1}, "silu=1"),
])
def test_bad_arguments_are_named(change, message):
    given = {"x": torch.zeros(SHAPE), "num_groups": GROUPS, "weight": None, "bias": None}
    with pytest.raises((ValueError, TypeError), match=message):
        PF.group_norm_silu(**{**given, **change})


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve group_norm_silu on cpu"):
        PF.group_norm_silu(torch.zeros(SHAPE), GROUPS, backend="triton")
