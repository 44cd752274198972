"""dequantise's kernels against the reference: the same bits."""

import pytest
import torch

from palp_fast import functional as PF

ROWS, COLUMNS, BLOCK = 4, 512, 64  # of a tile; numbers of an NF4 scale


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1])
@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK + 1, COLUMNS - 1, COLUMNS, COLUMNS + 1])
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_same_bits(form, width, rows):
    weight = PF.quantise(torch.randn(rows, width), form)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(*(weight.dequantise(dtype, backend=name) for name in ("triton", "reference")))


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_every_code_and_a_row_of_zeros(form):
    codes, scale = torch.arange(256).to(torch.int8 if form == "int8" else torch.uint8), torch.tensor([0.7, 0.0])
    shape = (2, 256) if form == "int8" else (2, 512)
    weight = PF.QuantisedWeight(codes.repeat(2, 1), scale if form == "int8" else scale[:, None].repeat(1, 8), shape)
    found = weight.dequantise(backend="triton")
    assert torch.equal(found, weight.dequantise(backend="reference")) and not found[1].any()
    assert len(found[0].unique()) == (256 if form == "int8" else 16)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_strided_codes_and_no_rows(form):
    weight = PF.quantise(torch.randn(6, 70), form)
    halves = (value[::2] for value in (weight.codes, weight.scale))
    half = PF.QuantisedWeight(*halves, (3, 70))
    assert torch.equal(half.dequantise(backend="triton"), weight.dequantise()[::2])
    empty = PF.QuantisedWeight(weight.codes[:0], weight.scale[:0], (0, 70))
    assert empty.dequantise(backend="triton").shape == (0, 70)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_lora_linear_by_kernels_alone(form):
    weight, x = PF.quantise(torch.randn(40, 24), form), torch.randn(5, 24, requires_grad=True)
    pair = torch.randn(3, 24), torch.randn(40, 3)
    results = []
    for name in ("triton", "reference"):
        y = PF.lora_linear(x, weight, None, *pair, backend=name)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
