"""layer_norm over the width, weight and bias frozen.

Bytes with n = rows x width elements: forward reads and writes n, backward reads 2 n and writes n; rows of statistics.
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import rows_and_widths
from palp_fast import functional


def make(rows, width, dtype, device):
    x, upstream = normal(device, dtype, 1, rows, width), normal(device, dtype, 1, rows, width)
    others = {"weight": 1 + normal(device, dtype, width, size=0.1), "bias": normal(device, dtype, width)}
    return Problem((x,), others, 5 * nbytes(x) + 16 * rows, upstream=(upstream,))


def formula(problem):
    weight, bias = problem.others["weight"], problem.others["bias"]
    return lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)


def ours(problem, backend):
    return lambda x: functional.layer_norm(x, **problem.others, backend=backend)


SHAPES = rows_and_widths()
PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("layer_norm", SHAPES, make, formula, ours, PROVIDERS, registered=("layer_norm",))]
