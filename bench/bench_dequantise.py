"""dequantise: what every call on a quantised weight does first, int8 by row and NF4; feed-forward layers of the models.

Bytes: reads codes and scales, writes the matrix. "eager" is the formula in plain PyTorch.
"""

import torch

from bench.core import Operator, Problem, Unavailable, nbytes, need
from bench.layers import rows_and_widths
from palp_fast.ops.registry import kind
from palp_fast.reference.quantised import BLOCK, nf4_levels

SHAPES = {
    f"{name}, {form}": (8 * width, width, form)
    for form in ("nf4", "int8") for name, (_, width) in rows_and_widths().items()
}


def make(d_out, width, form, dtype, device):
    if form == "int8":
        codes = torch.randint(-127, 128, (d_out, width), dtype=torch.int8, device=device)
        scale = torch.rand(d_out, device=device)
    else:
        codes = torch.randint(256, (d_out, width // 2), dtype=torch.uint8, device=device)
        scale = torch.rand(d_out, width // BLOCK, device=device)
    written = d_out * width * dtype.itemsize
    return Problem((codes, scale), {"width": width, "dtype": dtype}, nbytes(codes, scale) + written)


def formula(problem):
    def run(codes, scale):
        dtype = scale.dtype if scale.dtype == torch.float64 else problem.others["dtype"]
        if codes.dtype == torch.int8:
            return (codes * scale[:, None]).to(dtype)
        levels = levels_of(codes).to(scale.dtype)
        return (levels.view(*scale.shape, BLOCK) * scale[:, :, None]).flatten(1).to(dtype)

    return run


def levels_of(codes):
    """NF4 codes [d_out, bytes] -> their levels [d_out, 2 bytes], fp32."""
    return nf4_levels(codes.device)[torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1).int()]


def ours(problem, backend):
    operator = getattr(torch.ops.palp_fast.dequantise, kind("dequantise", problem.leaves[0].device, backend))
    return lambda codes, scale: operator(codes, scale, problem.others["width"], problem.others["dtype"])


def bitsandbytes(problem):
    need("bitsandbytes")
    import bitsandbytes  # noqa: F401  (registers its operators)

    codes, scale = problem.leaves
    if codes.dtype == torch.int8:
        raise Unavailable("bitsandbytes has no such format")
    shape, dtype = (len(codes), problem.others["width"]), problem.others["dtype"]
    return lambda codes, scale: torch.ops.bitsandbytes.dequantize_4bit(
        codes, scale.flatten(), BLOCK, "nf4", shape, dtype)


PROVIDERS = {"bitsandbytes": bitsandbytes}
OPERATORS = [Operator("dequantise", SHAPES, make, formula, ours, PROVIDERS, registered=("dequantise",))]
