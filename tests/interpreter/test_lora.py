"""The kernels of lora_linear and lora_projections against the reference, and their fp16 error against PyTorch's."""

import pytest
import torch
from close import assert_as_good, assert_close

from palp_fast import functional as PF
from palp_fast.functional.lora import lora_linear_residual
from palp_fast.kernels import lora
from palp_fast.kernels.lora import Launch

# A tile holds 32 rows where rows are few, 64 columns, 32 terms of a sum: one less, it, one more of each are at an edge.
ROWS = [1, 31, 32, 33]
WIDTHS = [(5, 63), (33, 65), (64, 7)]
RANKS = [1, 4, 16, 33, 128]
GATE = torch.tensor([0.0, 1.0, -0.5])
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def make(rows, d_in, d_out, rank, count, dtype, factor_dtype=None):
    """x [3, rows, d_in], weights, pairs, one upstream gradient per projection."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    kind = factor_dtype or dtype
    pairs = [(normal(rank, d_in, dtype=kind) * d_in**-0.5, normal(d_out, rank, dtype=kind)) for _ in range(count)]
    weights = [normal(d_out, d_in) * d_in**-0.5 for _ in range(count)]
    return normal(3, rows, d_in), weights, pairs, [normal(3, rows, d_out) for _ in range(count)]


def projections(x, weights, pairs, upstream, scale, backend, need_x=True, shadows=False):
    """[outputs, gradients to x and to every factor]."""
    x = x.detach().requires_grad_(need_x)
    pairs = [tuple(factor.detach().requires_grad_() for factor in pair) for pair in pairs]
    out = PF.lora_projections(x, PF.Projections.pack(weights, pairs, shadows=shadows), scale, backend=backend)
    return [*out, *torch.autograd.grad(out, [x] * need_x + list(sum(pairs, ())), upstream)]


def linear(x, weight, bias, pair, residual, upstream, scale, backend):
    """[output, gradients to x, to both factors and to the residual]."""
    leaves = [value.detach().requires_grad_() for value in (x, *pair, residual)]
    x, lora_a, lora_b, residual = leaves
    out = lora_linear_residual(x, weight, bias, lora_a, lora_b, residual, scale, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def check(found, wanted, tolerance):
    for i, (mine, true) in enumerate(zip(found, wanted, strict=True)):
        assert_close(mine, true, tolerance, f"result {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_edge_of_a_tile(rows, widths, dtype):
    x, weights, pairs, upstream = make(rows, *widths, 4, 2, dtype)
    found, wanted = (projections(x, weights, pairs, upstream, GATE, backend) for backend in ("triton", "reference"))
    check(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("again", [0.0, 1e9], ids=["x A^T first", "one launch"])
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_in_both_structures(rank, again, monkeypatch):
    monkeypatch.setattr(lora, "LAUNCHES", {"generic": Launch(again=again, blocks=4)})  # 4: splits of rows as well
    x, weights, pairs, upstream = make(35, 40, 70, rank, 3, torch.float32)
    found, wanted = (projections(x, weights, pairs, upstream, 0.3, backend) for backend in ("triton", "reference"))
    check(found, wanted, 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bias_residual_and_fixed_input(dtype):
    x, weights, pairs, upstream = make(7, 20, 30, 4, 1, dtype)
    bias, residual = upstream[0][0, 0] + 1, upstream[0] * 2
    for scale in (0.3, GATE):
        found, wanted = (linear(x, weights[0], bias, pairs[0], residual, upstream[0], scale, backend)
                         for backend in ("triton", "reference"))
        check(found, wanted, TOLERANCE[dtype])
    found, wanted = (projections(x, weights, pairs, upstream, GATE, backend, need_x=False)
                     for backend in ("triton", "reference"))
    check(found, wanted, TOLERANCE[dtype])


def plain(x, weights, pairs, upstream, dtype):
    """In PyTorch, all in one dtype."""
    x, *flat = (value.detach().to(dtype).requires_grad_() for value in (x, *sum(pairs, ())))
    gate = GATE.to(dtype).view(-1, 1, 1)
    out = [x @ weight.to(dtype).T + gate * (x @ a.T @ b.T) for weight, a, b in zip(weights, flat[::2], flat[1::2])]
    return [*out, *torch.autograd.grad(out, [x, *flat], [grad.to(dtype) for grad in upstream])]


@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["", "small B"])
@pytest.mark.parametrize("shadows", [False, True])
def test_fp16_is_as_good_as_pytorch(shadows, size):
    x, weights, pairs, upstream = make(33, 48, 70, 16, 3, torch.float16, torch.float32)
    pairs = [(a, size * b) for a, b in pairs]
    found = projections(x, weights, pairs, upstream, GATE, "triton", shadows=shadows)
    peer = plain(x, weights, pairs, upstream, torch.float16)
    truth = plain(x, weights, pairs, upstream, torch.float64)
    for i, (mine, its, true) in enumerate(zip(found, peer, truth, strict=True)):
        assert_as_good(mine, its, true, 1e-6, f"result {i}")


def test_fp16_keeps_what_underflows_in_it():
    """B of one small step and gradients without a loss scale: their products are far below the least fp16 number."""
    x, weights, pairs, upstream = make(33, 48, 70, 16, 1, torch.float16, torch.float32)
    pairs = [(a, 1e-5 * b) for a, b in pairs]
    weights, upstream = [0 * weights[0]], [1e-4 * upstream[0]]
    found = projections(x, weights, pairs, upstream, GATE, "triton")
    truth = plain(x, weights, pairs, upstream, torch.float64)
    assert_close(found[2], truth[2], 1e-3, "A")
    assert_close(found[3], truth[3], 1e-3, "B")


def test_same_bits_every_time():
    x, weights, pairs, upstream = make(70, 40, 70, 4, 3, torch.float32)
    once, again = (projections(x, weights, pairs, upstream, GATE, "triton") for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(once, again))


def test_strided_and_empty_input():
    x, weights, pairs, upstream = make(6, 20, 30, 4, 2, torch.float32)
    both = ("triton", "reference")
    grads = [grad[:1, :1].expand(3, 6, 30) for grad in upstream]
    wide = x.repeat(1, 1, 2)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., :20], wide[..., ::2]):
        found, wanted = (projections(strided, weights, pairs, grads, GATE, backend) for backend in both)
        check(found, wanted, 2e-6)
    for empty in (x[:0], x[:, :0]):
        grads = [torch.zeros(*empty.shape[:-1], 30)] * 2
        found, wanted = (projections(empty, weights, pairs, grads, 0.5, backend) for backend in both)
        check(found, wanted, 0.0)


def test_gradcheck():
    x, weights, pairs, _ = make(3, 5, 6, 2, 2, torch.float64)
    leaves = [value.requires_grad_() for value in (x, *sum(pairs, ()))]

    def run(x, *flat):
        packed = PF.Projections.pack(weights, list(zip(flat[::2], flat[1::2])))
        return PF.lora_projections(x, packed, GATE, backend="triton")

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
