"""renoise: the predicted x0, noised again: once, as the lean UNet wants it, and in four copies for four predictions.

Bytes with n elements: x_t, eps and noise are read (3 n), each copy is written (n or 4 n).
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import LATENTS
from palp_fast import functional

# What is done: (copies, whether to another timestep).
KINDS = {
    "": (4, False), ", other timestep": (4, True), ", one copy": (1, False), ", one copy, other timestep": (1, True)}
SHAPES = {name + kind: sizes + options for kind, options in KINDS.items() for name, sizes in LATENTS.items()}


def make(batch, side, copies, other, dtype, device):
    x_t, eps, noise = (normal(device, dtype, batch, 4, side, side) for _ in range(3))
    alpha_bar, new = 0.1 + 0.8 * torch.rand(2, batch, device=device)
    others = {"alpha_bar": alpha_bar, "new": new if other else None, "copies": copies}
    return Problem((x_t, eps, noise), others, (3 + copies) * nbytes(x_t))


def formula(problem):
    old, new, copies = problem.others.values()
    signal, sigma = (y.view(-1, 1, 1, 1) for y in (old.sqrt(), (1 - old).sqrt()))
    new_signal, new_sigma = (signal, sigma) if new is None else (
        y.view(-1, 1, 1, 1) for y in (new.sqrt(), (1 - new).sqrt()))

    def run(x_t, eps, noise):
        x0 = (x_t - sigma * eps) / signal
        x_hat = (new_signal * x0 + new_sigma * noise).to(x_t.dtype)
        return x_hat if copies == 1 else x_hat.repeat(copies, 1, 1, 1)

    return run


def ours(problem, backend):
    old, new, copies = problem.others.values()
    return lambda *images: functional.renoise(*images, old, alpha_bar_new=new, copies=copies, backend=backend)


PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("renoise", SHAPES, make, formula, ours, PROVIDERS, registered=("renoise",))]
