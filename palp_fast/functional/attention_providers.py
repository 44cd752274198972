"""Who computes attention: this package's operator, torch's scaled_dot_product_attention, or xformers.

`choose` takes what the table of measurements says for a card and a shape; where it has no row, the rule of `_by_rule`.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from palp_fast import backend
from palp_fast.functional.attention_table import TABLE, Case

_SDPA = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PROVIDERS = ("auto", "triton", *_SDPA, "xformers")
_XFORMERS = importlib.util.find_spec("xformers") is not None
_WIDEST = 160  # head that ByWidth of palp_fast/kernels/attention_parts.py has settings for
_FEW_WEIGHTS = 2**16  # queries times keys
_FEW_KEYS = 128  # MOST_KEYS of palp_fast/kernels/attention_cross.py; both modules need Triton


def choose(q: Tensor, k: Tensor, v: Tensor, heads: int, requested: str, backend_name: str) -> str:
    """The provider of a call: one of PROVIDERS, or "reference" for the operator in plain PyTorch.

    Raises ValueError for an unknown name or a provider beside a backend, RuntimeError if the request cannot be met.
    """
    if requested not in PROVIDERS:
        raise ValueError(f"provider={requested!r}: allowed are {', '.join(map(repr, PROVIDERS))}")
    if backend_name != "auto":
        if requested not in ("auto", backend_name):
            raise ValueError(f"provider={requested!r} with backend={backend_name!r}: allowed is one of them")
        chosen = backend.select("attention", q.device, backend_name)
        if chosen == "triton" and q.shape[-1] // heads > _WIDEST:
            raise RuntimeError(f"backend='triton' cannot serve attention here: {_obstacle(q, k, v, heads, chosen)}")
        return chosen
    if requested == "auto":
        for name in _preferred(q, k, heads):
            if _obstacle(q, k, v, heads, name) is None:
                return name
        return "reference"
    reason = _obstacle(q, k, v, heads, requested)
    if reason is not None:
        raise RuntimeError(f"provider={requested!r} cannot serve attention here: {reason}")
    return requested


def _preferred(q: Tensor, k: Tensor, heads: int) -> tuple[str, ...]:
    """Best first: the row of the table or the rule, then whatever serves."""
    if q.device.type != "cuda":
        return ()
    width, grad = q.shape[-1] // heads, torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    family = _family(q.device)
    row = TABLE.get(Case(family, str(q.dtype)[6:], width, q.shape[1], k.shape[1], "both" if grad else "forward"))
    return row or _by_rule(family, q.dtype, width, k.shape[1]), "sdpa", "triton"


def _by_rule(family: str, dtype: torch.dtype, width: int, keys: int) -> str:
    """By reasoning, not by measurement: SDPA except where our kernels do less work.

    Few keys: one pass, gradients of prompts summed in place of index_add. Widths that others pad to a power of two: on
    cards whose matrix products bind (consumer), not where the exponentials do (Hopper).
    """
    if family == "turing" or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"  # no matrix instructions in our kernels
    if keys <= _FEW_KEYS or (family == "consumer" and width & (width - 1)):
        return "triton"
    return "sdpa"


def _family(device: torch.device) -> str:
    if backend.obstacle("attention", device, "triton") is not None:
        return "generic"
    from palp_fast.kernels.launch import family_of

    return family_of(device)


def _obstacle(q: Tensor, k: Tensor, v: Tensor, heads: int, name: str) -> str | None:
    """Why a provider cannot serve this call, or None."""
    if name == "triton":
        if q.shape[-1] // heads > _WIDEST:
            return f"its heads are at most {_WIDEST} wide"
        return backend.obstacle("attention", q.device, "triton")
    if name == "xformers" and not _XFORMERS:
        return "xformers is not installed"
    if name != "sdpa" and q.device.type != "cuda":
        return f"it serves cuda tensors, not {q.device.type}"
    return _not_repeatable(q, k, v, name)


def _not_repeatable(q: Tensor, k: Tensor, v: Tensor, name: str) -> str | None:
    """Backward passes of others may add with atomics; flash and efficient do not where torch is told so."""
    needs_grad = torch.is_grad_enabled() and any(value.requires_grad for value in (q, k, v))
    if q.device.type != "cuda" or not needs_grad or not backend.is_deterministic():
        return None
    if name in ("sdpa", "sdpa_flash", "sdpa_efficient") and torch.are_deterministic_algorithms_enabled():
        return None
    return "its backward pass may differ from run to run; palp_fast.deterministic(False) allows it"


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, kv_index: Tensor | None) -> Tensor:
    """Attention by another provider; arguments as those of the operator."""
    if kv_index is not None:
        k, v = k[kv_index], v[kv_index]
    q, k, v = (value.unflatten(-1, (heads, -1)) for value in (q, k, v))
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v, scale=scale).flatten(-2)
    q, k, v = (value.transpose(1, 2) for value in (q, k, v))
    kernel = _SDPA[name]
    if kernel is None and _few_on_cpu(q, k, v):
        out = FewOnCPU.apply(q, k, v, scale)
    elif kernel is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        with sdpa_kernel(kernel):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(-2)


def _few_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.device.type != "cpu" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    needs_grad = torch.is_grad_enabled() and any(value.requires_grad for value in (q, k, v))
    few = 0 < q.shape[-2] * k.shape[-2] <= _FEW_WEIGHTS and q.numel() > 0
    return needs_grad and few and all(value.stride(-1) == 1 for value in (q, k, v))


class FewOnCPU(torch.autograd.Function):
    """apply(q, k, v, scale), [B, heads, N, D] each: torch's attention for the CPU, with its backward pass in fp32.

    That is 3 to 10 times faster there for few queries and keys, and keeps the same tensors in 16 bits.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, heads, N, D]."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        dense = torch.contiguous_format  # the kernel takes heads whose numbers are neighbours
        wide = (value.to(torch.float32, memory_format=dense) for value in (grad, q, k, v, out))
        bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = bwd(*wide, lse, 0.0, False, scale=ctx.scale)
        return *(value.to(q.dtype) for value in grads), None
