"""renoise: the predicted x0, noised again, in four copies for PALP's four predictions.

Bytes with n elements: x_t, eps and noise are read (3 n), each copy is written (4 n).
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import LATENTS
from palp_fast import functional

COPIES = 4
SHAPES = LATENTS | {f"{name}, other timestep": (*sizes, True) for name, sizes in LATENTS.items()}


def make(batch, side, *rest):
    *other, dtype, device = rest
    x_t, eps, noise = (normal(device, dtype, batch, 4, side, side) for _ in range(3))
    alpha_bar, new = 0.1 + 0.8 * torch.rand(2, batch, device=device)
    return Problem((x_t, eps, noise), {"alpha_bar": alpha_bar, "new": new if other else None}, 7 * nbytes(x_t))


def formula(problem):
    old, new = problem.others["alpha_bar"], problem.others["new"]
    signal, sigma = (y.view(-1, 1, 1, 1) for y in (old.sqrt(), (1 - old).sqrt()))
    new_signal, new_sigma = (signal, sigma) if new is None else (
        y.view(-1, 1, 1, 1) for y in (new.sqrt(), (1 - new).sqrt()))

    def run(x_t, eps, noise):
        x0 = (x_t - sigma * eps) / signal
        return (new_signal * x0 + new_sigma * noise).to(x_t.dtype).repeat(COPIES, 1, 1, 1)

    return run


def ours(problem, backend):
    old, new = problem.others["alpha_bar"], problem.others["new"]
    return lambda *images: functional.renoise(*images, old, alpha_bar_new=new, copies=COPIES, backend=backend)


PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("renoise", SHAPES, make, formula, ours, PROVIDERS, registered=("renoise",))]
