"""lora_attention, the whole layer: q, k, v with LoRA, attention, out projection with LoRA, bias; A and B in fp32.

Bytes: forward reads x (and the prompt), weights and factors and writes q, k, v, the attention's result and the output;
backward reads all of these and the gradient and writes dx (and the prompt's), dq, dk, dv, d result and the factors'.
FLOPs: those of its four projections and of its attention. "eager" is the formula with torch's attention.
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import RANK, TEXT, TRANSFORMERS
from bench.peft_layers import Attention, lora_factors, with_lora
from palp_fast import functional

SHAPES = {
    f"{name}, {kind}": (rows, width, heads, d_text if kind == "text" else 0)
    for kind in ("self", "text") for name, (rows, width, heads, d_text) in TRANSFORMERS.items()
}
NAMES = ("q", "k", "v", "out")


def make(rows, width, heads, d_text, dtype, device):
    x, upstream = normal(device, dtype, 1, rows, width), normal(device, dtype, 1, rows, width)
    inputs = [x, normal(device, dtype, 1, TEXT, d_text)] if d_text else [x]
    keys, d_kv = (TEXT, d_text) if d_text else (rows, width)
    sizes = {"q": (rows, width), "k": (keys, d_kv), "v": (keys, d_kv), "out": (rows, width)}  # rows, d_in
    weights = {name: normal(device, dtype, width, d_in, size=d_in**-0.5) for name, (_, d_in) in sizes.items()}
    factors = [factor for _, d_in in sizes.values() for factor in lora_factors(d_in, width, device)]
    others = {**weights, "bias": normal(device, dtype, width), "heads": heads}
    made = (6 * rows + 4 * keys) * width * dtype.itemsize + 5 * nbytes(*inputs)  # q, k, v, result, output; gradients
    traffic = made + 2 * nbytes(*weights.values()) + 3 * nbytes(*factors)
    products = sum(count * (4 * d_in * width + 6 * RANK * (d_in + width)) for count, d_in in sizes.values())
    return Problem((*inputs, *factors), others, traffic, products + 14 * rows * keys * width, (upstream,))


def split(problem, leaves):
    """(x, context or None, [(a, b) of q, k, v, out])."""
    inputs, factors = leaves[:-8], leaves[-8:]
    return inputs[0], inputs[1] if len(inputs) == 2 else None, list(zip(factors[::2], factors[1::2]))


def formula(problem):
    some = problem.others

    def run(*leaves):
        x, context, pairs = split(problem, leaves)

        def project(x, name, a, b):
            return x @ some[name].T + (x.to(a.dtype) @ a.T @ b.T).to(x.dtype)

        sources = (x, x, x) if context is None else (x, context, context)
        made = (project(source, name, *pair) for source, name, pair in zip(sources, NAMES, pairs))
        q, k, v = (y.unflatten(-1, (some["heads"], -1)).transpose(1, 2) for y in made)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return project(out, "out", *pairs[3]) + some["bias"]

    return run


def ours(problem, backend, **options):
    leaves = [leaf.detach().requires_grad_() for leaf in problem.leaves]
    _, context, pairs = split(problem, leaves)
    packed = functional.AttentionWeights.pack(
        {name: problem.others[name] for name in NAMES}, dict(zip(NAMES, pairs)), problem.others["bias"],
        cross=context is not None, shadows=leaves[0].dtype in (torch.float16, torch.bfloat16))

    def run(*leaves):
        x, context, _ = split(problem, leaves)
        return functional.lora_attention(x, context, packed, problem.others["heads"], backend=backend, **options)

    return run, leaves


def recomputed(problem):
    """Ours as "auto" chooses, keeping the inputs in place of q, k and v."""
    return ours(problem, "auto", recompute=True)


def peft(problem):
    module = Attention({n: problem.others[n] for n in NAMES}, {"out": problem.others["bias"]}, problem.others["heads"])
    inputs = [leaf.detach().requires_grad_() for leaf in problem.leaves[:-8]]
    parameters = with_lora(module, problem.leaves[-8:])
    return lambda *leaves: module(*leaves[:-8]), [*inputs, *parameters]


PROVIDERS = {"palp_fast recompute": recomputed, "peft": peft}
REGISTERED = ("attention", "lora_projections", "lora_linear")
OPERATORS = [Operator("lora_attention", SHAPES, make, formula, ours, PROVIDERS, registered=REGISTERED)]
