"""The methods as no-grad predictions: which model, which prompt, and its factor in the residual (PALP.md, variants).

r = [teacher_uncond + alpha (teacher_cond - teacher_uncond)] - [student_uncond + beta (student_cond - student_uncond)]

palp (eq. 6) as it stands; sds (eq. 4) with the noise eps' as student_cond; nfsd (arXiv 2310.17590) with the teacher's
prediction for the negative prompt as student_cond where u >= 200 and no noise below; dreambooth without a residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NFSD_THRESHOLD = 200


@dataclass(frozen=True)
class Pass:
    """One no-grad prediction at x_hat: the argument of score_residual it becomes, its prompt, its LoRA strength."""

    argument: str
    prompt: str
    lora_scale: float


TEACHER, STUDENT = 0.0, 1.0


def passes(cfg) -> list[Pass]:
    """The no-grad predictions of a step, without those whose factor is 0."""
    if cfg.method == "dreambooth" or cfg.residual_weight == 0:
        return []
    table = [
        (cfg.alpha, Pass("teacher_cond", "clean", TEACHER)),
        (1 - cfg.alpha, Pass("teacher_uncond", "empty", TEACHER)),
    ]
    if cfg.method == "palp":
        table += [
            (cfg.beta, Pass("student_cond", "subject", STUDENT)),
            (1 - cfg.beta, Pass("student_uncond", "empty", STUDENT)),
        ]
    if cfg.method == "nfsd":
        table.append((1.0, Pass("student_cond", "negative", TEACHER)))
    return [entry for factor, entry in table if factor != 0]


def split(cfg) -> tuple[list[Pass], list[Pass]]:
    """(those of the trained model: all where no other model is the teacher, those of another teacher)."""
    other = [entry for entry in passes(cfg) if cfg.teacher is not None and entry.lora_scale == TEACHER]
    return [entry for entry in passes(cfg) if entry not in other], other


def complete(
    method: str, predictions: dict[str, Tensor], space, *, x0_hat: Tensor, x_hat: Tensor, noise_new: Tensor,
    t_new: Tensor,
) -> dict[str, Tensor | None]:
    """The arguments of score_residual: the predictions, and what sds and nfsd put in the student's place.

    x_hat = a_u x0_hat + s_u noise_new, u = t_new; all [B, C, h, w], t_new [B].
    """
    arguments = dict.fromkeys(("teacher_cond", "teacher_uncond", "student_cond", "student_uncond")) | predictions
    if method == "sds":
        arguments["student_cond"] = space.of(x0_hat, noise_new, t_new)
    elif method == "nfsd":
        late = (t_new >= NFSD_THRESHOLD)[:, None, None, None]
        arguments["student_cond"] = torch.where(late, predictions["student_cond"], space.zero_eps(x_hat, t_new))
    return arguments
