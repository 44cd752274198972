"""lora_linear: x W^T + bias + (x A^T) B^T, the out projection of an attention layer; A and B in fp32.

Bytes: forward reads x, W, bias, A, B and writes y; backward reads x, dy, W, A, B and writes dx, dA, dB.
FLOPs: 2 rows (d^2 + 2 r d) forward; backward as many and 4 rows r d more for dA and dB.
"""

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import RANK, rows_and_widths
from bench.peft_layers import Projections, lora_factors, with_lora
from palp_fast import functional


def make(rows, width, dtype, device):
    x, upstream = normal(device, dtype, 1, rows, width), normal(device, dtype, 1, rows, width)
    weight, bias = normal(device, dtype, width, width, size=width**-0.5), normal(device, dtype, width)
    factors = lora_factors(width, width, device)
    traffic = 5 * nbytes(x) + 2 * nbytes(weight) + nbytes(bias) + 3 * nbytes(*factors)
    flops = 4 * rows * (width**2 + 2 * RANK * width) + 4 * rows * RANK * width
    return Problem((x, *factors), {"weight": weight, "bias": bias}, traffic, flops, (upstream,))


def formula(problem):
    weight, bias = problem.others["weight"], problem.others["bias"]

    def run(x, a, b):
        low = x.to(a.dtype) @ a.T @ b.T
        return x @ weight.T + bias + low.to(x.dtype)

    return run


def ours(problem, backend):
    return lambda x, a, b: functional.lora_linear(x, **problem.others, lora_a=a, lora_b=b, backend=backend)


def peft(problem):
    x, *factors = problem.leaves
    module = Projections({"out": problem.others["weight"]}, {"out": problem.others["bias"]})
    parameters = with_lora(module, factors)
    return lambda x, *_: module.to_out(x), [x.detach().requires_grad_(), *parameters]


SHAPES = rows_and_widths()
PROVIDERS = {"peft": peft}
OPERATORS = [Operator("lora_linear", SHAPES, make, formula, ours, PROVIDERS, registered=("lora_linear",))]
