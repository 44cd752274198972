"""geglu, the activation of every feed-forward block: h gelu(g) of [rows, 8 width].

Bytes with n = rows x 4 width elements: forward reads 2 n and writes n, backward reads 3 n and writes 2 n.
"""

import torch

from bench.core import Operator, Problem, normal
from bench.layers import rows_and_widths
from palp_fast import functional


def make(rows, width, dtype, device):
    x, upstream = normal(device, dtype, 1, rows, 8 * width), normal(device, dtype, 1, rows, 4 * width)
    return Problem((x,), {}, 8 * upstream.numel() * dtype.itemsize, upstream=(upstream,))


def formula(problem):
    def run(x):
        h, g = x.chunk(2, dim=-1)
        return h * torch.nn.functional.gelu(g)

    return run


def ours(problem, backend):
    return lambda x: functional.geglu(x, backend=backend)


SHAPES = rows_and_widths()
PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("geglu", SHAPES, make, formula, ours, PROVIDERS, registered=("geglu",))]
