"""attention's kernels with their committed settings: registers, shared memory, matrix instructions, launches."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from assembler import CARDS, EVERY, assert_fits, compiled, launches  # noqa: E402
from palp_fast.kernels.attention import attention_fwd  # noqa: E402
from palp_fast.kernels.attention_bwd import attention_bwd  # noqa: E402
from palp_fast.kernels.attention_parts import Parts, parts  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16] if EVERY else [torch.float16]
# Queries, width and number of heads: SD1.x at its three resolutions, SDXL.
SHAPES = [(4096, 40, 8), (1024, 80, 8), (256, 160, 8), (4096, 64, 10)]
# Triton multiplies without matrix instructions on sm_75, which keeps whole rows in registers: no kernel is chosen there
# unless asked for (attention_providers.py), and the widest heads may spill.
# On sm_120 dk and dv of 77 keys, 160 wide, take all 255 registers and 16 bytes: smaller tiles are to be timed first.
MAY_SPILL = {(75, 160): 512, (120, 160): 16}


def arguments(queries, keys, width, heads, dtype=torch.float16):
    """Of the forward and the backward launcher."""
    q, k = (torch.empty(2, length, heads * width, dtype=dtype, device="meta") for length in (queries, keys))
    lse = torch.empty(2, heads, queries, dtype=torch.float32, device="meta")
    rest = heads, width**-0.5, None
    return (q, k, k, *rest), (q, q, k, k, q, lse, *rest)


@pytest.mark.parametrize("target", CARDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("keys", ["self", 77])
@pytest.mark.parametrize("queries, width, heads", SHAPES)
def test_kernels_fit_the_card(queries, width, heads, keys, dtype, target):
    if target == 75 and dtype == torch.bfloat16:
        pytest.skip("sm_75 has no bf16")
    forward, backward = arguments(queries, queries if keys == "self" else keys, width, heads, dtype)
    found = [*compiled(attention_fwd, *forward, target=target), *compiled(attention_bwd, *backward, target=target)]
    assert len(found) == 3
    assert_fits(found, MAY_SPILL.get((target, width), 0))
    assert target == 75 or all(kernel.products > 0 or "sum" in kernel.kernel for kernel in found)


@pytest.mark.parametrize("target", [86, 89, 120] if EVERY else [86])
def test_width_40_is_not_padded_to_64(target):
    """At most 0.72 of the matrix instructions of the same kernels, same tiles, padded."""
    forward, backward = arguments(4096, 4096, 40, 8)
    for launcher, given in ((attention_fwd, forward), (attention_bwd, (*backward, True))):
        ours = compiled(launcher, *given, target=target)
        padded = compiled(lambda *args: launcher(*args, Parts(64, 0, 0)), *given, target=target)
        for mine, other in zip(ours, padded, strict=True):
            print(f"{mine.kernel} sm_{target}: {mine.products} / {other.products}")
            assert 0 < mine.products <= 0.72 * other.products, (mine, other)


def test_parts_of_a_head():
    assert [parts(width) for width in (40, 80, 160)] == [(32, 16, 8), (64, 16, 16), (128, 32, 32)]
    assert [parts(width) for width in (1, 16, 24, 64, 128)] == [(size, 0, 0) for size in (16, 16, 32, 64, 128)]
    for width in range(1, 161):
        first, second, kept = parts(width)
        assert width <= first + kept <= first + second or (width <= first and second == kept == 0)


@pytest.mark.parametrize("keys", [4096, 77])
@pytest.mark.parametrize("width", [40, 160])
def test_one_launch_forward_and_two_backward(keys, width):
    forward, backward = arguments(4096, keys, width, 8)
    assert len(launches(attention_fwd, *forward)) == 1
    assert len(launches(attention_bwd, *backward)) == 2
    assert launches(attention_bwd, *backward, False) == ["attention_bwd_dq_kernel"]
