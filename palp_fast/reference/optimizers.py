"""Update rules on flat fp32 tensors [blocks, size]; one short function per rule. All return new tensors."""

from __future__ import annotations

from torch import Tensor


def adamw_ref(
    param: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), decay first: (new param, (first, second moment)).

    step: [blocks, 1] fp64, the number of this update for the tensor that a block belongs to.
    """
    first, second = moments
    beta1, beta2 = betas
    first = (beta1 * first).add_(grad, alpha=1 - beta1)
    second = (beta2 * second).addcmul_(grad, grad, value=1 - beta2)
    # In fp32, 1 - beta2 would be off by 2e-5 at the first step.
    correction1, correction2 = ((1 - beta**step).to(param.dtype) for beta in betas)
    denominator = (second / correction2).sqrt_().add_(eps)
    update = (first / correction1).div_(denominator)
    return param * (1 - lr * weight_decay) - lr * update, (first, second)


def lion_ref(
    param: Tensor,
    grad: Tensor,
    moments: tuple[Tensor],
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
) -> tuple[Tensor, tuple[Tensor]]:
    """Lion (Chen et al., arXiv 2302.06675), decay first: (new param, (moment,)). `step` is not used."""
    (moment,) = moments
    beta1, beta2 = betas
    update = (beta1 * moment).add_(grad, alpha=1 - beta1).sign_()
    moment = (beta2 * moment).add_(grad, alpha=1 - beta2)
    return param * (1 - lr * weight_decay) - lr * update, (moment,)
