"""lora_projections: q, k and v of one input; A and B in fp32.

Bytes: forward reads x, three W, A, B and writes q, k, v; backward reads x, three gradients, W, A, B and writes dx, dA
and dB.
FLOPs: three times those of lora_linear.
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import RANK, rows_and_widths
from bench.peft_layers import Projections, lora_factors, with_lora
from palp_fast import functional

NAMES = ("q", "k", "v")


def make(rows, width, dtype, device):
    x, *upstream = (normal(device, dtype, 1, rows, width) for _ in range(4))
    weights = {name: normal(device, dtype, width, width, size=width**-0.5) for name in NAMES}
    factors = [factor for _ in NAMES for factor in lora_factors(width, width, device)]
    traffic = 9 * nbytes(x) + 2 * nbytes(*weights.values()) + 3 * nbytes(*factors)
    flops = 3 * (4 * rows * (width**2 + 2 * RANK * width) + 4 * rows * RANK * width)
    return Problem((x, *factors), weights, traffic, flops, tuple(upstream))


def formula(problem):
    def run(x, *factors):
        return tuple(x @ weight.T + (x.to(a.dtype) @ a.T @ b.T).to(x.dtype)
                     for weight, a, b in zip(problem.others.values(), factors[::2], factors[1::2]))

    return run


def ours(problem, backend):
    leaves = [leaf.detach().requires_grad_() for leaf in problem.leaves]
    pairs = list(zip(leaves[1::2], leaves[2::2]))
    shadows = leaves[0].dtype in (torch.float16, torch.bfloat16)
    packed = functional.Projections.pack(list(problem.others.values()), pairs, shadows=shadows)
    return lambda x, *_: functional.lora_projections(x, packed, backend=backend), leaves


def peft(problem):
    x, *factors = problem.leaves
    module = Projections(problem.others, {})
    parameters = with_lora(module, factors)
    return lambda x, *_: (module.to_q(x), module.to_k(x), module.to_v(x)), [x.detach().requires_grad_(), *parameters]


SHAPES = rows_and_widths()
PROVIDERS = {"peft": peft}
OPERATORS = [Operator("lora_projections", SHAPES, make, formula, ours, PROVIDERS, registered=("lora_projections",))]
