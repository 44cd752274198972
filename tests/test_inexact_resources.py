"""The kernels of inexact products with their committed settings: no spills, shared memory within the card's."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from assembler import CARDS, assert_fits, compiled  # noqa: E402
from palp_fast.kernels import inexact  # noqa: E402

HALF, FLOAT, CODE = torch.float16, torch.float32, torch.int8
SIZES = [(4096, 320, 320), (256, 1280, 5120)]  # rows, d_in, d_out


def meta(*shape: int, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def terms(rows: int, d_out: int, low: bool) -> tuple:
    return (meta(d_out, dtype=HALF), meta(rows, 32), meta(d_out, 32)) if low else (None, None, None)


def int8(rows: int, d_in: int, d_out: int, low: bool) -> tuple:
    numbers = meta(rows, d_in, dtype=CODE), meta(rows), meta(d_out, d_in, dtype=CODE), meta(d_out)
    return inexact.int8_linear, *numbers, *terms(rows, d_out, low), HALF


def fp16(rows: int, d_in: int, d_out: int, low: bool) -> tuple:
    return inexact.fp16_linear, meta(rows, d_in, dtype=HALF), meta(d_out, d_in, dtype=HALF), *terms(rows, d_out, low)


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [int8, fp16])
def test_kernel_fits_the_card(kind, size, low, target):
    if CARDS[target] == "turing":
        pytest.skip("Triton has no tensor-core product for sm_75: the reference runs there")
    launcher, *arguments = kind(*size, low)
    found = compiled(launcher, *arguments, target=target)
    assert_fits(found)
    assert found[0].products > 0


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("width", [320, 5120])
def test_quantise_rows_fits_the_card(width, target):
    assert_fits(compiled(inexact.quantise_rows, meta(4096, width, dtype=HALF), target=target))
