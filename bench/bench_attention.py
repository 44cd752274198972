"""attention: softmax(q k^T / sqrt(D)) v, to the image's own pixels (self) and to the 77 tokens of a prompt (text).

Bytes: forward reads q, k, v and writes the result, backward reads these and the gradient and writes dq, dk, dv.
FLOPs: 4 rows keys d forward, 10 rows keys d backward (q k^T again, dv, dp, dq, dk). "eager" is torch's
scaled_dot_product_attention, as diffusers calls it.
"""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.core import Operator, Problem, Unavailable, nbytes, need, normal, problem_device
from bench.layers import TEXT, TRANSFORMERS
from palp_fast import functional

SHAPES = {
    f"{name}, {kind}": (rows, rows if kind == "self" else TEXT, width, heads)
    for kind in ("self", "text") for name, (rows, width, heads, _) in TRANSFORMERS.items()
}
KERNELS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def make(rows, keys, width, heads, dtype, device):
    q, k, v, upstream = (normal(device, dtype, 1, count, width) for count in (rows, keys, keys, rows))
    traffic = 6 * nbytes(q) + 6 * nbytes(k)
    return Problem((q, k, v), {"heads": heads}, traffic, 14 * rows * keys * width, (upstream,))


def formula(problem):
    def run(q, k, v):
        q, k, v = (y.unflatten(-1, (problem.others["heads"], -1)).transpose(1, 2) for y in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)

    return run


def ours(problem, backend):
    return lambda q, k, v: functional.attention(q, k, v, problem.others["heads"], backend=backend)


def sdpa(kernel, problem):
    if problem_device(problem).type != "cuda":
        raise Unavailable("it serves cuda tensors")
    attend = formula(problem)

    def run(*qkv):
        with sdpa_kernel(kernel):
            return attend(*qkv)

    return run


def xformers(problem):
    need("xformers")
    from xformers.ops import memory_efficient_attention

    def run(q, k, v):
        q, k, v = (y.unflatten(-1, (problem.others["heads"], -1)) for y in (q, k, v))
        return memory_efficient_attention(q, k, v).flatten(-2)

    return run


PROVIDERS = {name: partial(sdpa, kernel) for name, kernel in KERNELS.items()} | {"xformers": xformers}
OPERATORS = [Operator("attention", SHAPES, make, formula, ours, PROVIDERS, registered=("attention",))]
