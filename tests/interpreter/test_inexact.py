"""The kernels of inexact products against the reference: int8 the same sums, fp16 an error no larger than its."""

import pytest
import torch
from close import assert_as_good, assert_close

from palp_fast import functional as PF

# A tile holds 32 rows where rows are few, 64 columns, 64 terms of a sum, 16 columns of the low-rank term.
SIZES = [(1, 5, 1), (31, 63, 65), (33, 64, 64), (32, 65, 7)]  # rows, d_in, d_out
RANKS = [None, 1, 17]


def made(rows, d_in, d_out, rank, dtype):
    """x, weight, bias, low and B or neither."""
    x, weight = torch.randn(rows, d_in).to(dtype), torch.randn(d_out, d_in) * d_in**-0.5
    terms = (None, None) if rank is None else (torch.randn(rows, rank), torch.randn(d_out, rank))
    return x, weight, torch.randn(d_out), terms


@pytest.mark.parametrize("width", [1, 511, 512, 1025])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_have_the_same_codes(width, dtype):
    x = torch.randn(5, width).to(dtype)
    x[1], x[2, 0] = 0, 300
    found, wanted = (getattr(torch.ops.palp_fast.quantise_rows, kind)(x) for kind in ("triton", "reference"))
    assert all(map(torch.equal, found, wanted)) and not found[0][1].any() and found[1][1] == 0


def test_halves_are_rounded_to_even_and_what_is_not_finite_shows():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [1.0, torch.nan, 0, 0, 0, 0], [1.0, -torch.inf, 0, 0, 0, 0]])
    codes, scale = torch.ops.palp_fast.quantise_rows.triton(x)
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2] and scale[0] == 1 and not scale[1:].isfinite().any()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int8(sizes, rank, dtype):
    x, weight, bias, terms = made(*sizes, rank, dtype)
    weight = PF.quantise(weight, "int8")
    arguments = *torch.ops.palp_fast.quantise_rows(x), weight.codes, weight.scale
    for shift in (None, bias):
        found, wanted = (getattr(torch.ops.palp_fast.int8_linear, kind)(*arguments, shift, *terms, dtype)
                         for kind in ("triton", "reference"))
        assert found.dtype == dtype
        assert_close(found, wanted, 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sizes", SIZES)
def test_fp16(sizes, rank):
    x, weight, bias, terms = made(*sizes, rank, torch.float16)
    truth = x.double() @ weight.half().double().T + bias.double()
    if rank is not None:
        truth += terms[0].double() @ terms[1].double().T
    found, peer = (getattr(torch.ops.palp_fast.fp16_linear, kind)(x, weight, bias, *terms)
                   for kind in ("triton", "reference"))
    assert_as_good(found, peer, truth, 1e-4)


def test_no_rows():
    weight = PF.quantise(torch.randn(6, 8), "int8")
    with torch.no_grad(), PF.inexact_products("int8"):
        assert PF.frozen_linear(torch.empty(0, 8), weight, backend="triton").shape == (0, 6)


def test_layers_run_by_kernels_alone():
    weight, pair = PF.quantise(torch.randn(40, 24), "int8"), (torch.randn(3, 24), torch.randn(40, 3))
    x, gate = torch.randn(2, 5, 24), torch.tensor([0.0, 1.0])
    with torch.no_grad(), PF.inexact_products("int8"):
        found, wanted = (PF.lora_linear(x, weight, None, *pair, gate, backend=name) for name in ("triton", "reference"))
    assert_close(found, wanted, 1e-6)
