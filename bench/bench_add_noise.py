"""add_noise: noisy latents and their noise. Bytes with n elements: x0 is read, x_t and noise are written (3 n).

"eager" is what a training script writes, torch.randn_like and the sum, whose noise depends on how samples are split
over ranks; ours is a function of seed, step and sample. So results are judged by what they share: x_t without its own
noise, and the noise's standard deviation to two digits.
"""

import torch

from bench.core import Operator, Problem, nbytes, normal
from bench.layers import LATENTS
from palp_fast import functional


def make(batch, side, dtype, device):
    x0 = normal(device, dtype, batch, 4, side, side)
    t = torch.randint(1000, (batch,), device=device)
    return Problem((x0,), {"t": t, "alphas": torch.linspace(0.999, 0.005, 1000, device=device)}, 3 * nbytes(x0))


def formula(problem):
    t, alphas = problem.others["t"], problem.others["alphas"]

    def run(x0):
        noise = torch.randn_like(x0)
        alpha_bar = alphas[t].view(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt().to(x0.dtype), (1 - alpha_bar).sqrt().to(x0.dtype)
        return signal * x0 + sigma * noise, noise, alpha_bar

    return run


def ours(problem, backend):
    t, alphas = problem.others["t"], problem.others["alphas"]

    def run(x0):
        return *functional.add_noise(x0, t, alphas, seed=1, step=2, backend=backend), alphas[t].view(-1, 1, 1, 1)

    return run


def judge(results, problem):
    x_t, noise, alpha_bar = (y.double() for y in results)
    return [x_t - (1 - alpha_bar).sqrt() * noise, (20 * noise.std()).round()]


SHAPES = LATENTS
PROVIDERS: dict = {}  # no other library has it
OPERATORS = [Operator("add_noise", SHAPES, make, formula, ours, PROVIDERS, registered=("add_noise",), judge=judge)]
