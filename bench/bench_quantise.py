"""quantise: a frozen weight in 8 or 4 bits, once at loading; feed-forward layers of the models.

Bytes: reads the matrix, writes codes and scales. "eager" is the formula in plain PyTorch. Judged by how far what the
codes stand for is from the weight: of two levels equally near either is right. Ours also reads the scales back to refuse weights that are not finite.
"""

import torch

from bench.bench_dequantise import SHAPES, levels_of
from bench.core import Operator, Problem, Unavailable, need, normal
from palp_fast import functional
from palp_fast.reference.quantised import BLOCK, nf4_levels


def make(d_out, width, form, dtype, device):
    weight = normal(device, dtype, d_out, width, size=width**-0.5)
    written = d_out * (width + 4) if form == "int8" else d_out * width * 9 // 16  # half a byte, 4 for 64 numbers
    return Problem((weight,), {"form": form}, weight.numel() * dtype.itemsize + written)


def formula(problem):
    form = problem.others["form"]

    def run(weight):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if form == "int8":
            scale = wide.abs().amax(1) / 127
            return (wide / scale[:, None]).round().to(torch.int8), scale
        blocks = wide.view(len(wide), -1, BLOCK)
        scale, levels = blocks.abs().amax(2), nf4_levels(weight.device).to(wide.dtype)
        codes = torch.bucketize(blocks / scale[:, :, None], (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten(1)
        return codes[:, ::2] << 4 | codes[:, 1::2], scale

    return run


def ours(problem, backend):
    def run(weight):
        made = functional.quantise(weight, problem.others["form"])
        return made.codes, made.scale

    return run


def bitsandbytes(problem):
    need("bitsandbytes")
    import bitsandbytes  # noqa: F401  (registers its operators)

    (weight,) = problem.leaves
    if problem.others["form"] == "int8":
        raise Unavailable("bitsandbytes quantises rows to int8 for products with outliers, in fp16 alone")

    def run(weight):
        codes, scale = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
        return codes.view(len(weight), -1), scale.view(len(weight), -1)

    return run


def judge(results, problem):
    codes, scale = results
    if codes.dtype == torch.int8:
        made = codes.double() * scale.double()[:, None]
    else:
        made = (levels_of(codes).double().view(*scale.shape, BLOCK) * scale.double()[:, :, None]).flatten(1)
    return [(problem.leaves[0].double() - made).abs()]


PROVIDERS = {"bitsandbytes": bitsandbytes}
OPERATORS = [Operator("quantise", SHAPES, make, formula, ours, PROVIDERS, judge=judge)]
