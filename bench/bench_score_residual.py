"""score_residual and score_combination, NFSD's three predictions in it; loss and gradient to the prediction.

Bytes with n elements of s bytes: forward reads pred, target and K predictions, four or three ((2 + K) s n) and writes
the fp32 gradient (4 n); backward reads it (4 n) and writes the gradient to pred (s n).
"""

from dataclasses import replace

import torch

from bench.core import Operator, Problem, nbytes
from bench.layers import LATENTS
from palp_fast import functional

SETTINGS = {"alpha": 15.0, "beta": 7.5, "residual_weight": 0.1}
NAMES = ("target", "teacher_cond", "teacher_uncond", "student_cond", "student_uncond")


def make(batch, side, dtype, device):
    # Views of one batch, as a UNet that predicts for several prompts at once returns them.
    pred, *rest = torch.randn(6, batch, 4, side, side, device=device).to(dtype).unbind(0)
    traffic = 7 * nbytes(pred) + 8 * pred.numel()
    others = dict(zip(NAMES, rest)) | {"residual_scale": torch.rand(batch, device=device)}
    return Problem((pred.clone(),), others, traffic, upstream=(torch.ones((), device=device),))


def formula(problem):
    target, *predictions, scale = problem.others.values()
    wide = torch.promote_types(target.dtype, torch.float32)
    alpha, beta, weight = SETTINGS.values()

    def run(pred):
        tc, tu, sc, su = (y.to(wide) for y in predictions)
        residual = (tu + alpha * (tc - tu)) - (su + beta * (sc - su))
        pred = pred.to(wide)
        losses = (pred - target.to(wide)).square() - weight * scale.view(-1, 1, 1, 1) * residual * pred
        return losses.sum() / pred.numel()

    return run


def ours(problem, backend):
    return lambda pred: functional.score_residual(pred, **problem.others, **SETTINGS, backend=backend)[0]


def make_three(batch, side, dtype, device):
    """NFSD: teacher with and without prompt and the negative prompt, which early timesteps do without."""
    problem = make(batch, side, dtype, device)
    others = dict(zip(NAMES[:4], problem.others.values())) | {"residual_scale": problem.others["residual_scale"]}
    alpha, is_late = 7.5, (torch.arange(batch, device=device) % 2).float()
    coefficients = torch.stack([alpha + 0 * is_late, 1 - alpha + 0 * is_late, -is_late])
    fewer = problem.nbytes - problem.leaves[0].numel() * dtype.itemsize
    return replace(problem, others=others | {"coefficients": coefficients}, nbytes=fewer)


def formula_three(problem):
    target, *predictions, scale, coefficients = problem.others.values()
    wide = torch.promote_types(target.dtype, torch.float32)

    def run(pred):
        residual = sum(c.view(-1, 1, 1, 1) * y.to(wide) for c, y in zip(coefficients, predictions))
        pred = pred.to(wide)
        losses = (pred - target.to(wide)).square()
        losses = losses - SETTINGS["residual_weight"] * scale.view(-1, 1, 1, 1) * residual * pred
        return losses.sum() / pred.numel()

    return run


def ours_three(problem, backend):
    target, *predictions, scale, coefficients = problem.others.values()
    return lambda pred: functional.score_combination(
        pred, target, predictions, coefficients, residual_weight=SETTINGS["residual_weight"], residual_scale=scale,
        backend=backend)[0]


SHAPES = LATENTS
PROVIDERS: dict = {}  # no other library has it
OPERATORS = [
    Operator("score_residual", SHAPES, make, formula, ours, PROVIDERS, registered=("score_combination",)),
    Operator(
        "score_combination", SHAPES, make_three, formula_three, ours_three, PROVIDERS,
        registered=("score_combination",)),
]
