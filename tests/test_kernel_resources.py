"""Every Triton kernel with its committed settings compiles for every card: no spills, shared memory within the card's.

Compiled from the launchers themselves, on tensors of the meta device: what is compiled is what would be launched.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from assembler import TARGETS, compiled  # noqa: E402
from palp_fast.kernels import geglu  # noqa: E402
from palp_fast.kernels.launch import SHARED_KIB  # noqa: E402

HALF = torch.float16


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# Launcher and arguments at sizes of SD1.x.
CASES = {
    "geglu": (geglu.geglu_fwd, meta(4096, 2560)),
    "geglu backward": (geglu.geglu_bwd, meta(4096, 1280), meta(4096, 2560)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_fits_the_card(case, target):
    launcher, *arguments = CASES[case]
    found = compiled(launcher, *arguments, target=target)
    assert found
    for kernel in found:
        print(kernel)
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= 1024 * SHARED_KIB[TARGETS[target]], kernel
