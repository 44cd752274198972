"""score_residual, loss and gradient to the prediction.

Bytes with n elements of s bytes: forward reads pred, target and four predictions (6 s n) and writes the fp32 gradient
(4 n); backward reads it (4 n) and writes the gradient to pred (s n).
"""

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


OPERATORS = [
    Operator("score_residual", LATENTS, make, formula, ours, registered=("score_combination",)),
]
