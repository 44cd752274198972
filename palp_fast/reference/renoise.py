"""renoise: the one-step estimate of x0, noised again (PALP.md step 2).

    x0_hat = (x_t - s_t eps) / a_t,   x_hat = a_u x0_hat + s_u eps'
           = (a_u / a_t) (x_t - s_t eps) + s_u eps'

With u = t nothing is divided, so nothing grows at large t: x_hat = x_t + s_t (eps' - eps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype, per_sample


def renoise_ref(
    x_t: Tensor,
    eps_pred: Tensor,
    noise: Tensor,
    alpha_bar: Tensor,
    alpha_bar_new: Tensor | None,
    copies: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """[copies B, C, H, W]: `copies` equal batches one after another."""
    compute = compute_dtype([x_t, eps_pred, noise])
    x, eps, new_noise = x_t.to(compute), eps_pred.to(compute), noise.to(compute)
    ratio, s_t, s_u = renoise_coefficients(alpha_bar, alpha_bar_new, x)
    if ratio is None:
        x_hat = x + s_t * (new_noise - eps)
    else:
        x_hat = ratio * (x - s_t * eps) + s_u * new_noise
    return x_hat.to(dtype or x_t.dtype).repeat(copies, 1, 1, 1)


def renoise_coefficients(
    alpha_bar: Tensor, alpha_bar_new: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(a_u / a_t or None if u = t, s_t, s_u), each [B, 1, 1, 1]."""
    old = per_sample(alpha_bar, like)
    s_t = (1 - old).sqrt()
    if alpha_bar_new is None:
        return None, s_t, s_t
    new = per_sample(alpha_bar_new, like)
    return new.sqrt() / old.sqrt(), s_t, (1 - new).sqrt()


def renoise_bwd_ref(
    grad: Tensor,
    alpha_bar: Tensor,
    alpha_bar_new: Tensor | None,
    copies: int,
    compute: torch.dtype,
    x_dtype: torch.dtype,
    eps_dtype: torch.dtype,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x_t, eps_pred and the noise in use, [B, C, H, W] each; copies are summed."""
    total = grad.to(compute).unflatten(0, (copies, alpha_bar.shape[0])).sum(0)
    ratio, s_t, s_u = renoise_coefficients(alpha_bar, alpha_bar_new, total)
    d_x = total if ratio is None else ratio * total
    d_eps = -s_t * d_x
    d_noise = s_u * total
    # An operator may not return one tensor twice, so each result owns its memory.
    return tuple(_owned(d, dtype, total) for d, dtype in ((d_x, x_dtype), (d_eps, eps_dtype), (d_noise, noise_dtype)))


def _owned(value: Tensor, dtype: torch.dtype, source: Tensor) -> Tensor:
    out = value.to(dtype).contiguous()
    return out.clone() if out is source else out
