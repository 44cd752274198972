"""group_norm_silu, 32 groups, channels-last, weight and bias frozen.

Bytes with n elements: forward reads n for the statistics and again for the result and writes n, backward reads x and
the gradient twice and writes n.
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from palp_fast import functional

GROUPS = 32
SHAPES = {  # channels, side
    "SD1.x 32x32": (640, 32), "SD1.x 64x64": (320, 64), "SD1.x 16x16": (1280, 16), "SD1.x 8x8, up": (2560, 8),
    "SD2 48x48": (640, 48), "SDXL 128x128": (320, 128), "SDXL 64x64": (640, 64),
}


def make(channels, side, dtype, device):
    x, upstream = (normal(device, dtype, 1, channels, side, side).to(memory_format=torch.channels_last) for _ in "xy")
    others = {"weight": 1 + normal(device, dtype, channels, size=0.1), "bias": normal(device, dtype, channels)}
    return Problem((x,), others, 8 * nbytes(x), upstream=(upstream,))


def formula(problem):
    weight, bias = problem.others["weight"], problem.others["bias"]
    return lambda x: torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, weight, bias))


def ours(problem, backend):
    return lambda x: functional.group_norm_silu(x, GROUPS, **problem.others, backend=backend)


PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("group_norm_silu", SHAPES, make, formula, ours, PROVIDERS, registered=("group_norm_silu",))]
