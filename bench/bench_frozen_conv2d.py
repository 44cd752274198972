"""frozen_conv2d: 3 x 3 convolutions of the residual blocks, channels-last.

Bytes: forward reads x, the weight and the bias and writes y, backward reads dy and the weight and writes dx.
FLOPs: 2 pixels 9 channels_in channels_out, twice.
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from palp_fast import functional

SHAPES = {  # channels in, channels out, side
    "SD1.x 32x32": (640, 640, 32), "SD1.x 64x64": (320, 320, 64), "SD1.x 16x16, up": (2560, 1280, 16),
    "SD2 96x96": (320, 320, 96), "SDXL 128x128": (320, 320, 128), "SDXL 32x32": (1280, 1280, 32),
}


def make(inputs, outputs, side, dtype, device):
    last = torch.channels_last
    x, upstream = (normal(device, dtype, 1, c, side, side).to(memory_format=last) for c in (inputs, outputs))
    weight = normal(device, dtype, outputs, inputs, 3, 3, size=(9 * inputs) ** -0.5).to(memory_format=last)
    others = {"weight": weight, "bias": normal(device, dtype, outputs)}
    traffic = 2 * nbytes(x, upstream, weight) + nbytes(others["bias"])
    return Problem((x,), others, traffic, 36 * side * side * inputs * outputs, (upstream,))


def formula(problem):
    return lambda x: torch.nn.functional.conv2d(x, **problem.others, padding=1)


def ours(problem, backend):
    return lambda x: functional.frozen_conv2d(x, **problem.others, padding=1, backend=backend)


PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("frozen_conv2d", SHAPES, make, formula, ours, PROVIDERS, registered=("frozen_conv2d",))]
