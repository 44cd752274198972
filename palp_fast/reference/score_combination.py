"""score_combination: reconstruction loss and alignment residual in one scalar (PALP.md steps 1, 3 and 4).

    r    = sum_k factors[k] coefficients[k, b] predictions[k]                         (constant)
    loss = sum_b w_b sum(mask (pred - target)^2 - lambda c_b r pred) / numel
    d loss / d pred = w_b (2 mask (pred - target) - lambda c_b r) / numel

with w = sample_weight, c = residual_scale, lambda = residual_weight; what is None is 1 everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype, per_sample


def score_combination_ref(
    pred: Tensor,
    target: Tensor,
    predictions: list[Tensor],
    factors: list[float],
    coefficients: Tensor | None,
    residual_weight: float,
    residual_scale: Tensor | None,
    sample_weight: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [], stats [B, 3], gradient of the loss to pred [B, C, H, W]), in fp32, or fp64 where an image is."""
    dtype = compute_dtype([pred, target, *predictions])
    batch = pred.shape[0]
    p = pred.to(dtype)
    residual = _combine(predictions, factors, coefficients, p)
    error = p - target.to(dtype)
    pull = 2 * error
    squares = error * error
    if mask is not None:
        pull = mask.to(dtype) * pull
        squares = mask.to(dtype) * squares
    weight = torch.full((batch,), residual_weight, dtype=dtype, device=p.device)
    if residual_scale is not None:
        weight = weight * residual_scale.to(dtype)
    gradient = pull - per_sample(weight, p) * residual

    stats = _stats(squares, residual, gradient)
    per_image = squares.flatten(1).sum(1) - weight * (residual * p).flatten(1).sum(1)
    share = 1 / max(p.numel(), 1)
    if sample_weight is not None:
        per_image = sample_weight.to(dtype) * per_image
        share = share * per_sample(sample_weight, p)
    return per_image.sum() / max(p.numel(), 1), stats, (share * gradient).contiguous()


def _combine(predictions: list[Tensor], factors: list[float], coefficients: Tensor | None, like: Tensor) -> Tensor:
    """r, summed in the order given: equal terms of opposite sign that are neighbours cancel exactly."""
    residual = torch.zeros_like(like)
    for term, (factor, prediction) in enumerate(zip(factors, predictions, strict=True)):
        scale = factor if coefficients is None else factor * per_sample(coefficients[term], like)
        residual = residual + scale * prediction.to(like.dtype)
    return residual


def _stats(squares: Tensor, residual: Tensor, gradient: Tensor) -> Tensor:
    """[B, 3]: mean squared error, RMS of r, RMS of the gradient before sample_weight."""
    count = max(squares[0].numel() if squares.shape[0] else 0, 1)
    mean_square = squares.flatten(1).sum(1) / count
    rms_residual = ((residual * residual).flatten(1).sum(1) / count).sqrt()
    rms_gradient = ((gradient * gradient).flatten(1).sum(1) / count).sqrt()
    return torch.stack([mean_square, rms_residual, rms_gradient], dim=1)


def score_combination_bwd_ref(grad_output: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """What goes back to pred: grad_output gradient, rounded once to `dtype`."""
    return (grad_output.to(gradient.dtype) * gradient).to(dtype)
