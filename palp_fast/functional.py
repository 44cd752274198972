"""The operators: formula, shapes, checks. Each runs on the best backend for its device (see backend.py).

Floating inputs may be fp16, bf16, fp32 or fp64, each its own, and of any strides. Arithmetic is fp32, or fp64 when
an image-shaped input is fp64; results are rounded once. A bad argument raises ValueError or TypeError naming
the argument, its value and what is allowed. Values of tensors are checked on the CPU alone, and never read back from
another device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast import checks as _checks
from palp_fast import ops as _ops
from palp_fast.reference import philox as _philox

__all__ = ["add_noise", "lora_linear", "renoise", "score_combination", "score_residual"]

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
    _checks.image("pred", pred)
    _checks.image_like("target", target, pred)
    if not isinstance(predictions, (list, tuple)):
        raise TypeError(f"predictions={type(predictions).__name__}: allowed is a list of [B, C, H, W] tensors")
    if len(predictions) > _MOST_TERMS:
        raise ValueError(f"predictions has {len(predictions)} tensors: allowed are at most {_MOST_TERMS}")
    for index, prediction in enumerate(predictions):
        _checks.image_like(f"predictions[{index}]", prediction, pred)
    _checks.table("coefficients", coefficients, (len(predictions), pred.shape[0]), pred)
    ones = [1.0] * len(predictions)
    weights = (residual_weight, residual_scale, sample_weight, mask)
    return _combine(pred, target, predictions, ones, coefficients, *weights, backend)


def _combine(
    pred, target, predictions, factors, coefficients, residual_weight, residual_scale, sample_weight, mask, backend
) -> tuple[Tensor, Tensor]:
    """The operator, after the checks of the arguments that both of its callers take."""
    _checks.number("residual_weight", residual_weight)
    _checks.per_sample("residual_scale", residual_scale, pred)
    _checks.per_sample("sample_weight", sample_weight, pred)
    mask = _checks.mask("mask", mask, pred)
    op = _ops.overload("score_combination", pred.device, backend)
    loss, stats, _ = op(
        pred, target, predictions, factors, coefficients, float(residual_weight), residual_scale, sample_weight, mask
    )
    return loss, stats


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
    _checks.image("pred", pred)
    _checks.image_like("target", target, pred)
    _checks.number("alpha", alpha)
    _checks.number("beta", beta)
    # Teacher and student side by side: where they agree and alpha = beta, the residual is exactly 0.
    terms = [
        ("teacher_cond", teacher_cond, alpha),
        ("student_cond", student_cond, -beta),
        ("teacher_uncond", teacher_uncond, 1 - alpha),
        ("student_uncond", student_uncond, beta - 1),
    ]
    predictions, factors = [], []
    for name, prediction, factor in terms:
        if factor == 0:
            continue
        if prediction is None:
            raise ValueError(f"{name}=None: a tensor is needed at alpha={alpha}, beta={beta} (its factor is {factor})")
        _checks.image_like(name, prediction, pred)
        predictions.append(prediction)
        factors.append(float(factor))
    weights = (residual_weight, residual_scale, sample_weight, mask)
    return _combine(pred, target, predictions, factors, None, *weights, backend)


def renoise(
    x_t: Tensor,
    eps_pred: Tensor,
    noise: Tensor,
    alpha_bar: Tensor,
    *,
    alpha_bar_new: Tensor | None = None,
    noise_new: Tensor | None = None,
    copies: int = 1,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The predicted x0, noised again (PALP.md step 2; arXiv 2401.06105, eq. 2):

        x0_hat = (x_t - s_t eps_pred) / a_t,   x_hat = a_u x0_hat + s_u eps'

    with a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar). x_t, eps_pred, noise: [B, C, H, W]. alpha_bar: [B], that of t,
    in (0, 1]. alpha_bar_new: [B], that of u, or None for u = t (then nothing is divided by a_t). eps' is noise_new, or
    noise.

    Returns [copies B, C, H, W] contiguous, the batch repeated `copies` times, in `dtype` (None: that of x_t).
    Gradients flow to x_t, eps_pred and eps'. Raises TypeError or ValueError for bad arguments, RuntimeError if
    `backend` cannot serve.
    """
    _checks.image("x_t", x_t)
    _checks.image_like("eps_pred", eps_pred, x_t)
    _checks.image_like("noise", noise, x_t)
    for name, value in (("alpha_bar", alpha_bar), ("alpha_bar_new", alpha_bar_new)):
        _checks.per_sample(name, value, x_t, required=name == "alpha_bar")
        if value is not None:
            _checks.fractions(name, value)
    if noise_new is not None:
        _checks.image_like("noise_new", noise_new, x_t)
        noise = noise_new
    _checks.integer("copies", copies, minimum=1)
    if dtype is not None and dtype not in _checks.FLOATING:
        raise TypeError(f"dtype={dtype}: allowed are {_checks.FLOATING_NAMES}, None")
    op = _ops.overload("renoise", x_t.device, backend)
    return op(x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies, dtype)


def add_noise(
    x0: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_offset: int | Tensor = 0,
    stream: int = _philox.STREAM_NOISE,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x_t = a_t x0 + s_t noise with noise ~ N(0, 1) that is a function of (seed, step, sample, element) alone.

    Philox-4x32-10 with key = seed and counter = (element / 4, sample_offset + b, step, stream), Box-Muller in fp32;
    elements are numbered row-major in [C, H, W] whatever the strides. x0: [B, C, H, W]; t: [B] int64 indices into
    alphas_cumprod [T] with values in (0, 1]; a t outside of it is an error on the CPU and gives x_t = NaN elsewhere.
    seed, step, sample_offset: int or 0-d int64 tensor; one on a GPU is read there, so that a captured graph draws anew
    at every replay. A second independent noise for the same step takes another `stream` (3 or more: 0 is this one, 1
    and 2 belong to the timestep sampler).

    Returns (x_t, noise), contiguous, in the dtype of x0; x_t is made from the noise as returned. Gradient to x0.
    Raises TypeError or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    _checks.image("x0", x0)
    _checks.schedule("alphas_cumprod", alphas_cumprod, x0)
    _checks.alphas("alphas_cumprod", alphas_cumprod)
    _checks.indices("t", t, x0)
    _checks.below("t", t, alphas_cumprod.shape[0])
    _checks.integer("stream", stream, minimum=0, maximum=2**32 - 1)
    counters = [
        _checks.counter(name, value, x0)
        for name, value in (("seed", seed), ("step", step), ("sample_offset", sample_offset))
    ]
    return _ops.overload("add_noise", x0.device, backend)(x0, t, alphas_cumprod, *counters, stream)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_scale: float | Tensor = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """x W^T + bias + lora_scale (x A^T) B^T, the low-rank term never merged into W (Hu et al., arXiv 2106.09685).

    x: [..., d_in]; weight: [d_out, d_in], frozen, of any floating dtype; bias: [d_out] or None; lora_a: [r, d_in] and
    lora_b: [d_out, r], usually fp32; lora_scale: a float, or [B] with B = x.shape[0], one factor per sample.
    The frozen product runs in the dtype of x (under autocast: the autocast dtype), the low-rank term in fp32.

    Returns [..., d_out] in that dtype. Gradients to x, lora_a and lora_b (in their own dtypes), to nothing else.
    Raises TypeError or ValueError for bad arguments, RuntimeError if `backend` cannot serve.
    """
    _checks.floating("x", x)
    _checks.lora(x, weight, bias, lora_a, lora_b)
    gate, scale = None, 1.0
    if isinstance(lora_scale, Tensor):
        gate = _checks.gate("lora_scale", lora_scale, x)
    else:
        _checks.number("lora_scale", lora_scale)
        scale = float(lora_scale)
    op = _ops.overload("lora_linear", x.device, backend)
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return op(x, weight, bias, lora_a, lora_b, scale, gate)[0]
    x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return op(x, weight, bias, lora_a, lora_b, scale, gate)[0]
