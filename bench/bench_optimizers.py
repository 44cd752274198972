"""One optimizer step on the LoRA of a whole model at rank 32.

Bytes per element: gradient read, parameter read and written (12), each 8-bit moment read and written (2). "eager" is
torch's fused AdamW with moments in fp32 (28 bytes), Lion is written with torch's foreach operators; torch has no 8-bit
optimizer. Judged by the change of the parameters after three steps against the rule in fp64, with room for other ways
to quantise: bitsandbytes' AdamW8bit errs 2.7 times as much as ours, a learning rate that is off by a tenth 7 times.
Lion's step has one size, so a wrong sign is all that its 8 bits can do: 1e-3 are two of a million elements, in one step
of three.
"""

from functools import partial

import torch

from bench.core import Operator, Problem, need
from bench.layers import RANK
from palp_fast import optim

# width -> transformer blocks; width of the text
SHAPES = {"SD1.x": ({320: 5, 640: 5, 1280: 6}, 768), "SDXL": ({640: 10, 1280: 60}, 2048)}
COMPILING = "a step over hundreds of tensors takes minutes to compile"
LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def sizes(blocks, d_text):
    """A [r, d_in] and B [d_out, r] of q, k, v and out, in self- and cross-attention."""
    inputs = [(width, width if name in ("q", "out") else context)
              for width, count in blocks.items() for _ in range(count)
              for context in (width, d_text) for name in ("q", "k", "v", "out")]
    return [shape for width, d_in in inputs for shape in ((RANK, d_in), (width, RANK))]


def make(blocks, d_text, dtype, device, *, moments):
    params = [0.01 * torch.randn(shape, device=device, dtype=dtype) for shape in sizes(blocks, d_text)]
    grads = [1e-3 * torch.randn_like(param) for param in params]
    traffic = sum(param.numel() for param in params) * (12 + 2 * moments)
    return Problem((), {"params": params, "grads": grads, "first": params[0]}, traffic)


def stepping(problem, kind, **options):
    """A function that steps and returns by how much the parameters have changed."""
    starts = problem.others["params"]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    for param, grad in zip(params, problem.others["grads"]):
        param.grad = grad.clone()
    optimizer = kind(params, **options)

    def step():
        optimizer.step()
        return changes

    changes = Changes(params, starts)
    return step


class Changes(list):
    """What the parameters have changed by, as one tensor made when it is looked at: no part of a step."""

    def __init__(self, params, starts):
        super().__init__()
        self.params, self.starts = params, starts

    def judged(self):
        return [torch.cat([(p.detach() - s).flatten() for p, s in zip(self.params, self.starts)])]


class PlainLion(torch.optim.Optimizer):
    """Lion by foreach operators: sign of an interpolation, one moment in the dtype of the parameters."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.moments = [torch.zeros_like(param) for param in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        (beta1, beta2), params = group["betas"], group["params"]
        grads = [param.grad for param in params]
        direction = torch._foreach_sign(torch._foreach_lerp(self.moments, grads, 1 - beta1))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, direction, alpha=-group["lr"])
        torch._foreach_lerp_(self.moments, grads, 1 - beta2)


def torch_adamw(problem):
    return stepping(problem, torch.optim.AdamW, fused=True, **ADAMW)


def bitsandbytes(name, options, problem):
    need("bitsandbytes")
    import bitsandbytes

    return stepping(problem, getattr(bitsandbytes.optim, name), min_8bit_size=1, **options)


def torchao(problem):
    need("torchao")
    from torchao.optim import AdamW8bit

    return stepping(problem, AdamW8bit, **ADAMW)


def ours(kind, options, problem, backend):
    return stepping(problem, kind, backend=backend, **options)


def wide(problem):
    """Ours with fp32 moments, on the backend that serves."""
    return stepping(problem, optim.AdamW, **ADAMW)


def operator(name, kind, options, moments, formula, registered, room=0.0):
    return Operator(
        name, SHAPES, partial(make, moments=moments), formula, partial(ours, kind, options), PROVIDERS[name],
        registered=(registered,), judge=lambda changes, _: changes.judged(), yardstick="palp_fast reference",
        slack=4.0, room=room, calls=3, refused={"torch.compile": COMPILING}, dtypes=(torch.float32,))


PROVIDERS = {
    "AdamW8bit": {
        "palp_fast AdamW": wide, "bitsandbytes": partial(bitsandbytes, "AdamW8bit", ADAMW), "torchao": torchao,
    },
    "Lion8bit": {"bitsandbytes": partial(bitsandbytes, "Lion8bit", LION)},
}
OPERATORS = [
    operator("AdamW8bit", optim.AdamW8bit, ADAMW, 2, torch_adamw, "adamw"),
    operator("Lion8bit", optim.Lion8bit, LION, 1, lambda problem: stepping(problem, PlainLion, **LION), "lion",
             room=1e-3),
]
