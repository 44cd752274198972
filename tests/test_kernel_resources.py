"""Every Triton kernel with its committed settings compiles for every card: no spills, shared memory within the card's.

Compiled from the launchers themselves, on tensors of the meta device: what is compiled is what would be launched.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from assembler import CARDS, assert_fits, compiled, launches  # noqa: E402
from palp_fast.kernels import dequantise, geglu, group_norm, group_norm_bwd, layer_norm  # noqa: E402

HALF = torch.float16


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def image(channels: int, size: int, last: bool = True) -> torch.Tensor:
    return meta(2, channels, size, size).to(memory_format=torch.channels_last if last else torch.contiguous_format)


def group_norm_case(x: torch.Tensor) -> tuple:
    return group_norm.group_norm_silu_fwd, x, 32, *meta(2, x.shape[1]), 1e-5, True


def group_norm_bwd_case(x: torch.Tensor) -> tuple:
    statistics = meta(2, x.shape[0], 32, dtype=torch.float32)
    return group_norm_bwd.group_norm_silu_bwd, x, x, *statistics, *meta(2, x.shape[1]), True


def layer_norm_case(width: int) -> tuple:
    return layer_norm.layer_norm_fwd, meta(4096, width), *meta(2, width), 1e-5, False


def layer_norm_bwd_case(width: int, from_output: bool) -> tuple:
    mean, rstd = meta(2, 4096, dtype=torch.float32)
    given = meta(4096, width), meta(4096, width), None if from_output else mean, rstd
    return layer_norm.layer_norm_bwd, *given, *meta(2, width)


def dequantise_case(form: str, width: int, dtype: torch.dtype) -> tuple:
    codes, scale = (meta(1280, width, dtype=torch.int8), meta(1280, dtype=torch.float32)) if form == "int8" else (
        meta(1280, width // 2, dtype=torch.uint8), meta(1280, width // 64, dtype=torch.float32))
    return dequantise.dequantise_rows, codes, scale, width, dtype


# Sizes of SD1.x.
IMAGES = {
    "320 x 64 x 64": image(320, 64), "1280 x 16 x 16": image(1280, 16), "2560 x 8 x 8": image(2560, 8),
    "320 x 64 x 64 contiguous": image(320, 64, last=False),
}
# Launcher and arguments.
CASES = {
    "geglu": (geglu.geglu_fwd, meta(4096, 2560)),
    "geglu backward": (geglu.geglu_bwd, meta(4096, 1280), meta(4096, 2560)),
    **{f"group_norm_silu {size}": group_norm_case(x) for size, x in IMAGES.items()},
    **{f"group_norm_silu backward {size}": group_norm_bwd_case(x) for size, x in IMAGES.items()},
    **{f"layer_norm {width}": layer_norm_case(width) for width in (320, 1280)},
    **{f"layer_norm backward {width}": layer_norm_bwd_case(width, from_output=False) for width in (320, 1280)},
    **{f"dequantise {form} 1280 x {width} to {str(dtype)[6:]}": dequantise_case(form, width, dtype)
       for form in ("int8", "nf4") for width, dtype in ((320, HALF), (1280 * 9, HALF), (1280, torch.float32))},
    "layer_norm backward from the output": layer_norm_bwd_case(1280, from_output=True),
}


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("case", CASES)
def test_kernel_fits_the_card(case, target):
    launcher, *arguments = CASES[case]
    assert_fits(compiled(launcher, *arguments, target=target))


@pytest.mark.parametrize(("size", "forward", "backward"), [
    ("320 x 64 x 64", 2, 2), ("1280 x 16 x 16", 1, 2), ("2560 x 8 x 8", 1, 1), ("320 x 64 x 64 contiguous", 2, 2),
])
def test_group_norm_launches(size, forward, backward):
    assert len(launches(*CASES[f"group_norm_silu {size}"])) == forward
    assert len(launches(*CASES[f"group_norm_silu backward {size}"])) == backward


@pytest.mark.parametrize("case", ["layer_norm 320", "layer_norm backward 320", "layer_norm backward from the output"])
def test_layer_norm_launches(case):
    assert len(launches(*CASES[case])) == 1
