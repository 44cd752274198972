"""The kernels of LoRA projections with their committed settings: no spills, shared memory within the card's."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from assembler import CARDS, EVERY, assert_fits, compiled  # noqa: E402
from palp_fast.kernels import lora  # noqa: E402

HALF, FLOAT = torch.float16, torch.float32
RANKS, DTYPES = ((32, 4), (HALF, torch.bfloat16)) if EVERY else ((32,), (HALF,))


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def projections(rows: int, width: int, rank: int, dtype: torch.dtype, *, backward: bool = False) -> tuple:
    """q, k and v of one input with shadows of A, per-sample strength."""
    x = meta(2, rows // 2, width, dtype=dtype)
    factors = meta(rank, width, dtype=FLOAT), meta(width, rank, dtype=FLOAT)
    weights = meta(3 * width, width, dtype=dtype), meta(3 * rank, width, dtype=dtype)
    arguments = (x, *weights, *factors * 3, 1.0, meta(2, dtype=FLOAT))
    if backward:
        return lora.lora_projections_bwd, x, x, x, *arguments, True
    return lora.lora_projections_fwd, *arguments


def projection(rows: int, width: int, rank: int, dtype: torch.dtype, *, backward: bool = False) -> tuple:
    """The out projection, its A in 32 bits."""
    x = meta(2, rows // 2, width, dtype=dtype)
    factors = meta(rank, width, dtype=FLOAT), meta(width, rank, dtype=FLOAT)
    if backward:
        return lora.lora_linear_bwd, x, x, meta(width, width, dtype=dtype), *factors, 1.0, None, True
    return lora.lora_linear_fwd, x, meta(width, width, dtype=dtype), meta(width, dtype=dtype), *factors, x, 1.0, None


# Launcher and arguments at sizes of SD1.x.
CASES = {
    f"{made.__name__}{' backward' * backward} {rows} x {width}, rank {rank}, {str(dtype)[6:]}":
        made(rows, width, rank, dtype, backward=backward)
    for made, ranks, dtypes in ((projections, RANKS, DTYPES), (projection, (32,), (HALF,)))
    for rows, width in ((4096, 320), (1024, 640), (256, 1280))
    for rank in ranks
    for dtype in dtypes
    for backward in (False, True)
} | {
    # Numbers that are 1 are constants to the compiler; a rank of 128 is more than one tile.
    f"projections{' backward' * backward} {rows} x {width}, rank {rank}":
        projections(rows, width, rank, HALF, backward=backward)
    for rows, width, rank in ((2, 1, 1), (1024, 640, 128))
    for backward in (False, True)
}


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_fits_the_card(case, target):
    if CARDS[target] == "turing":
        pytest.skip("Triton has no tensor-core product for sm_75: cuBLAS makes these there")
    launcher, *arguments = CASES[case]
    assert_fits(compiled(launcher, *arguments, target=target))
