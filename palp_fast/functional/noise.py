"""add_noise and renoise: noisy latents."""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast import checks
from palp_fast.ops.registry import call, compiled_on_cpu, overload
from palp_fast.reference import philox


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
    checks.integer("copies", copies, minimum=1)
    if noise_new is None:
        images = (x_t, eps_pred, noise)
        made = compiled_on_cpu("renoise", backend, *images, alpha_bar, alpha_bar_new, copies, dtype, tracked=(0, 1, 2))
        if made is not None:
            _fractions(alpha_bar, alpha_bar_new)
            return made
    checks.image("x_t", x_t)
    checks.image_like("eps_pred", eps_pred, x_t)
    checks.image_like("noise", noise, x_t)
    for name, value in (("alpha_bar", alpha_bar), ("alpha_bar_new", alpha_bar_new)):
        checks.per_sample(name, value, x_t, required=name == "alpha_bar")
    _fractions(alpha_bar, alpha_bar_new)
    if noise_new is not None:
        checks.image_like("noise_new", noise_new, x_t)
        noise = noise_new
    if dtype is not None and dtype not in checks.FLOATING:
        raise TypeError(f"dtype={dtype}: allowed are {checks.FLOATING_NAMES}, None")
    op = overload("renoise", x_t.device, backend)
    return call(op, x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies, dtype, tracked=(0, 1, 2))


def _fractions(alpha_bar: Tensor, alpha_bar_new: Tensor | None) -> None:
    checks.fractions("alpha_bar", alpha_bar)
    if alpha_bar_new is not None:
        checks.fractions("alpha_bar_new", alpha_bar_new)


def add_noise(
    x0: Tensor,
    t: Tensor,
    alphas_cumprod: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_offset: int | Tensor = 0,
    stream: int = philox.STREAM_NOISE,
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
    checks.image("x0", x0)
    checks.schedule("alphas_cumprod", alphas_cumprod, x0)
    checks.alphas("alphas_cumprod", alphas_cumprod)
    checks.indices("t", t, x0)
    checks.below("t", t, alphas_cumprod.shape[0])
    checks.integer("stream", stream, minimum=0, maximum=2**32 - 1)
    counters = [
        checks.counter(name, value, x0)
        for name, value in (("seed", seed), ("step", step), ("sample_offset", sample_offset))
    ]
    return overload("add_noise", x0.device, backend)(x0, t, alphas_cumprod, *counters, stream)
