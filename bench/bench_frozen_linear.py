"""frozen_linear: the layers of the feed-forward blocks.

Bytes: forward reads x, the weight and the bias and writes y, backward reads dy and the weight and writes dx.
FLOPs: 2 rows d_in d_out, twice.
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import rows_and_widths
from palp_fast import functional

SHAPES = {
    f"{name}, {part}": (rows, width * first, width * last)
    for name, (rows, width) in rows_and_widths().items() for part, first, last in (("in", 1, 8), ("out", 4, 1))
}


def make(rows, d_in, d_out, dtype, device):
    x, upstream = normal(device, dtype, 1, rows, d_in), normal(device, dtype, 1, rows, d_out)
    others = {"weight": normal(device, dtype, d_out, d_in, size=d_in**-0.5), "bias": normal(device, dtype, d_out)}
    traffic = 2 * nbytes(x, upstream, others["weight"]) + nbytes(others["bias"])
    return Problem((x,), others, traffic, 4 * rows * d_in * d_out, (upstream,))


def formula(problem):
    return lambda x: torch.nn.functional.linear(x, **problem.others)


def ours(problem, backend):
    return lambda x: functional.frozen_linear(x, **problem.others, backend=backend)


PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("frozen_linear", SHAPES, make, formula, ours, PROVIDERS, registered=("frozen_linear",))]
