"""score_combination and score_residual: the loss of PALP and its kin."""

from __future__ import annotations

from torch import Tensor

from palp_fast import checks
from palp_fast.ops.registry import call, compiled_on_cpu, overload

_MOST_TERMS = 8  # kMostTerms of csrc/include/palp_fast/score_combination.h


def score_combination(
    pred: Tensor,
    target: Tensor,
    predictions: list[Tensor],
    coefficients: Tensor,
    *,
    residual_weight: float = 1.0,
    residual_scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Reconstruction loss plus alignment residual for any linear combination of predictions.

    r = sum_k coefficients[k, b] predictions[k], a constant, and

        loss = sum_b sample_weight_b sum(mask (pred - target)^2 - residual_weight residual_scale_b r pred) / numel

    so that the gradient to pred is sample_weight (2 mask (pred - target) - residual_weight residual_scale r) / numel
    (Arar et al., arXiv 2401.06105, eq. 6 and 7, rescaled). Nothing else receives a gradient.

    pred, target, each of `predictions` (at most 8): [B, C, H, W]. coefficients: [K, B] on the same device.
    residual_scale, sample_weight: [B] or None (= 1). mask: [B, 1, H, W], floating or bool, or None (= 1).

    Returns (loss, stats): loss a scalar, stats [B, 3] without gradient: mean of mask (pred - target)^2, root mean
    square of r, root mean square of 2 mask (pred - target) - residual_weight residual_scale r. Both fp32, or fp64 for
    fp64 inputs. Raises TypeError or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    if not isinstance(predictions, (list, tuple)):
        raise TypeError(f"predictions={type(predictions).__name__}: allowed is a list of [B, C, H, W] tensors")
    if len(predictions) > _MOST_TERMS:
        raise ValueError(f"predictions has {len(predictions)} tensors: allowed are at most {_MOST_TERMS}")
    if coefficients is None:
        raise TypeError("coefficients=None: allowed is a floating tensor [K, B]")
    names = [f"predictions[{index}]" for index in range(len(predictions))]
    ones = [1.0] * len(predictions)
    weights = (residual_weight, residual_scale, sample_weight, mask)
    return _combine(pred, target, names, predictions, ones, coefficients, *weights, backend)


def _combine(
    pred, target, names, predictions, factors, coefficients, residual_weight, residual_scale, sample_weight, mask,
    backend,
) -> tuple[Tensor, Tensor]:
    """The operator and the checks of its arguments. names: those of the predictions."""
    checks.number("residual_weight", residual_weight)
    images, weights = (pred, target, predictions, factors, coefficients), (residual_scale, sample_weight)
    made = None
    if mask is None:
        made = compiled_on_cpu(
            "score_combination", backend, *images, float(residual_weight), *weights, None, tracked=(0,))
    if made is None:
        mask = _check(pred, target, names, predictions, coefficients, residual_scale, sample_weight, mask)
        op = overload("score_combination", pred.device, backend)
        made = call(op, *images, float(residual_weight), *weights, mask, tracked=(0,))
    return made[0], made[1]


def _check(pred, target, names, predictions, coefficients, residual_scale, sample_weight, mask) -> Tensor | None:
    """Raises for what is not allowed; returns the mask, floating."""
    checks.image("pred", pred)
    checks.image_like("target", target, pred)
    for name, prediction in zip(names, predictions, strict=True):
        checks.image_like(name, prediction, pred)
    if coefficients is not None:
        checks.table("coefficients", coefficients, (len(predictions), pred.shape[0]), pred)
    checks.per_sample("residual_scale", residual_scale, pred)
    checks.per_sample("sample_weight", sample_weight, pred)
    return checks.mask("mask", mask, pred)


def score_residual(
    pred: Tensor,
    target: Tensor,
    teacher_cond: Tensor | None,
    teacher_uncond: Tensor | None,
    student_cond: Tensor | None,
    student_uncond: Tensor | None,
    *,
    alpha: float,
    beta: float,
    residual_weight: float = 1.0,
    residual_scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """PALP's loss (arXiv 2401.06105, eq. 1 and 6): `score_combination` with the difference of two guided predictions,

        r = [teacher_uncond + alpha (teacher_cond - teacher_uncond)]
            - [student_uncond + beta (student_cond - student_uncond)]

    Every prediction is [B, C, H, W]; one whose factor is 0 may be None: teacher_uncond at alpha = 1, student_uncond at
    beta = 1, teacher_cond at alpha = 0, student_cond at beta = 0. Other arguments, results and errors as there.
    """
    checks.number("alpha", alpha)
    checks.number("beta", beta)
    # Teacher and student side by side: where they agree and alpha = beta, the residual is exactly 0.
    terms = [
        ("teacher_cond", teacher_cond, alpha),
        ("student_cond", student_cond, -beta),
        ("teacher_uncond", teacher_uncond, 1 - alpha),
        ("student_uncond", student_uncond, beta - 1),
    ]
    names, predictions, factors = [], [], []
    for name, prediction, factor in terms:
        if factor == 0:
            continue
        if prediction is None:
            raise ValueError(f"{name}=None: a tensor is needed at alpha={alpha}, beta={beta} (its factor is {factor})")
        names.append(name)
        predictions.append(prediction)
        factors.append(float(factor))
    weights = (residual_weight, residual_scale, sample_weight, mask)
    return _combine(pred, target, names, predictions, factors, None, *weights, backend)
