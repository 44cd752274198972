"""The optimizer operators in plain PyTorch, on rows ("blocks") of equal size that never cross tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from palp_fast.reference.blockwise import dequantise, quantise

MOST = torch.finfo(torch.float32).max


def grad_norm_ref(
    grads: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None, max_norm: float
) -> tuple[Tensor, Tensor]:
    """(norm of all gradients over grad_scale, 0-d; verdict [2]: factor on all gradients, 1 if finite), fp32."""
    # fp64: the square of a large but finite fp32 gradient must not overflow.
    norms = [torch.linalg.vector_norm(grad.to(torch.float32), dtype=torch.float64) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = torch.ones_like(norm)
    if grad_scale is not None:
        factor = factor / grad_scale.reshape(()).double()
        norm = norm * factor
    factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    finite = norm.isfinite() & factor.to(torch.float32).isfinite()
    if found_inf is not None:
        finite = finite & (found_inf.reshape(()) == 0)
    return norm.to(torch.float32), torch.stack([factor, finite.to(torch.float64)]).to(torch.float32)


def adamw_ref(
    params: list[Tensor],
    grads: list[Tensor],
    shadows: list[Tensor],
    steps: Tensor,
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    verdict: Tensor,
    group: Tensor,
    block_size: int,
) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), decay first, in place.

    A gradient without elements leaves its parameter alone. steps [tensors] fp32; a moment is [codes, scales] or
    [values] of all tensors' blocks [blocks, block_size]; group [5] fp64: lr, beta1, beta2, eps, weight_decay.
    """
    rows = _Rows(params, grads, steps, verdict, block_size)
    lr, beta1, beta2, eps, weight_decay = group.unbind()
    # In fp32, 1 - beta2 would be off by 2e-5 at the first step.
    correction1, correction2 = (1 - beta ** rows.steps.double() for beta in (beta1, beta2))
    step_size, inverse_root = rows.spread(lr / correction1), rows.spread(correction2.rsqrt())
    first = beta1.float() * rows.read(exp_avg, True) + (1 - beta1).float() * rows.grad
    second = beta2.float() * rows.read(exp_avg_sq, False) + (1 - beta2).float() * (rows.grad * rows.grad)
    second = second.clamp_(max=MOST)  # infinity would become NaN in 8 bits
    change = step_size * first / (second.sqrt() * inverse_root + eps.float())
    rows.write(exp_avg, first, True)
    rows.write(exp_avg_sq, second, False)
    rows.finish(rows.param * (1 - lr * weight_decay).float() - change, params, shadows, steps)


def lion_ref(
    params: list[Tensor],
    grads: list[Tensor],
    shadows: list[Tensor],
    steps: Tensor,
    exp_avg: list[Tensor],
    verdict: Tensor,
    group: Tensor,
    block_size: int,
) -> None:
    """Lion (Chen et al., arXiv 2302.06675), decay first, in place; arguments as adamw_ref, eps is not used."""
    rows = _Rows(params, grads, steps, verdict, block_size)
    lr, beta1, beta2, _, weight_decay = group.unbind()
    old = rows.read(exp_avg, True)
    direction = beta1.float() * old + (1 - beta1).float() * rows.grad
    rows.write(exp_avg, beta2.float() * old + (1 - beta2).float() * rows.grad, True)
    change = lr.float() * direction.sign()
    rows.finish(rows.param * (1 - lr * weight_decay).float() - change, params, shadows, steps)


class _Rows:
    """Parameters and gradients as fp32 [blocks, size], and which rows the update may touch."""

    def __init__(self, params: list[Tensor], grads: list[Tensor], steps: Tensor, verdict: Tensor, size: int) -> None:
        self.size, self.device = size, steps.device
        self.rows = tuple(-(-param.numel() // size) for param in params)
        self.owner = _owner(self.rows, self.device)
        present = _mask(tuple(grad.numel() > 0 for grad in grads), self.device)
        self.active = present & (verdict[1] != 0)
        self.keep = ~self.active[self.owner][:, None]
        self.steps = steps + 1
        self.param, self.grad = self.gather(params), self.gather(grads).mul_(verdict[0])

    def spread(self, values: Tensor) -> Tensor:
        """[tensors] -> fp32 [blocks, 1]."""
        return values.to(torch.float32)[self.owner][:, None]

    def read(self, moment: list[Tensor], signed: bool) -> Tensor:
        return dequantise(*moment, signed) if len(moment) == 2 else moment[0]

    def write(self, moment: list[Tensor], value: Tensor, signed: bool) -> None:
        if len(moment) == 1:
            moment[0].copy_(torch.where(self.keep, moment[0], value))
            return
        codes, scales = quantise(value, signed)
        moment[0].copy_(torch.where(self.keep, moment[0], codes))
        moment[1].copy_(torch.where(self.keep[:, 0], moment[1], scales))

    def finish(self, param: Tensor, params: list[Tensor], shadows: list[Tensor], steps: Tensor) -> None:
        """Write the new parameters, their shadows and the step counts."""
        flat = torch.where(self.keep, self.param, param).reshape(-1)
        torch._foreach_copy_(params, self._parts(flat, params))
        pairs = [(shadow, part) for shadow, part in zip(shadows, params) if shadow.numel() > 0]
        if pairs:
            torch._foreach_copy_([shadow for shadow, _ in pairs], [part for _, part in pairs])
        steps.copy_(torch.where(self.active, self.steps, steps))

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """The tensors as rows; padding and tensors without elements are 0."""
        flat = torch.zeros(sum(self.rows) * self.size, device=self.device)
        pairs = [(part, tensor) for part, tensor in zip(self._parts(flat, tensors), tensors) if tensor.numel() > 0]
        if pairs:
            torch._foreach_copy_([part for part, _ in pairs], [tensor for _, tensor in pairs])
        return flat.view(-1, self.size)

    def _parts(self, flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        starts = [self.size * sum(self.rows[:index]) for index in range(len(self.rows))]
        pairs = zip(starts, tensors)
        return [flat[start : start + tensor.numel()].view(tensor.shape) for start, tensor in pairs]


@lru_cache(maxsize=64)
def _owner(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """[blocks]: the tensor that each belongs to."""
    return torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows, dtype=torch.int64)).to(device)


@lru_cache(maxsize=64)
def _mask(present: tuple[bool, ...], device: torch.device) -> Tensor:
    return torch.tensor(present, dtype=torch.bool).to(device)
