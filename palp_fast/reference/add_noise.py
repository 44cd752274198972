"""add_noise: x_t = a_t x0 + s_t noise, the noise a function of (seed, step, sample, element) alone."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.reference import philox
from palp_fast.reference.dtypes import compute_dtype, per_sample


def add_noise_ref(
    x0: Tensor, t: Tensor, alphas_cumprod: Tensor, seed: Tensor, step: Tensor, sample_offset: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """(x_t, noise), both in the shape and dtype of x0; x_t is made from the noise as returned."""
    compute = compute_dtype([x0])
    samples = torch.arange(x0.shape[0], dtype=torch.int64, device=x0.device) + sample_offset
    noise = philox.normal(samples, x0[0].numel() if x0.shape[0] else 0, step, seed, stream)
    noise = noise.reshape(x0.shape).to(x0.dtype)
    alpha_bar = per_sample(alphas_cumprod.to(compute)[t], x0.to(compute))
    x_t = alpha_bar.sqrt() * x0.to(compute) + (1 - alpha_bar).sqrt() * noise.to(compute)
    return x_t.to(x0.dtype).contiguous(), noise.contiguous()


def add_noise_bwd_ref(grad: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """d x0 = a_t d x_t."""
    compute = compute_dtype([grad])
    wide = grad.to(compute)
    return (per_sample(alphas_cumprod.to(compute)[t].sqrt(), wide) * wide).to(grad.dtype).contiguous()
