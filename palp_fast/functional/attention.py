"""attention: softmax attention between the projections."""

from __future__ import annotations

from torch import Tensor

from palp_fast import autocast, checks
from palp_fast.functional.attention_providers import attend, choose
from palp_fast.ops.registry import overload


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    softmax_scale: float | None = None,
    kv_index: Tensor | None = None,
    provider: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """softmax(softmax_scale q k^T) v for every head (Vaswani et al., arXiv 1706.03762, eq. 1).

    q: [B, N, heads D]; k, v: [P, M, heads D] with M >= 1, taken in the dtype of q (under autocast: all three in the
    autocast dtype). Heads lie side by side in the last dimension, as projections leave them; nothing is transposed
    or copied as long as that dimension has stride 1. kv_index: [B] int64, which of the P prompts a row attends to;
    None: its own, P = B. softmax_scale: > 0, None is D^-0.5. The softmax is computed in fp32 (fp64 for fp64).

    provider: "triton" (this package's kernels, D <= 160), "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient" (torch's
    scaled_dot_product_attention), "xformers", or "auto": the fastest known for card and shape, among those whose
    gradients repeat bit for bit unless palp_fast.deterministic(False). backend: other than "auto", this package's
    operator on that backend.

    Returns [B, N, heads D] in the dtype of q. Gradients to q, k and v, those of a prompt summed over its rows in a
    fixed order. Keeps q, k, v, the result and one number per row and head. Raises TypeError or ValueError for bad
    arguments, RuntimeError if `provider` or `backend` cannot serve.
    """
    checks.attention(q, k, v, heads, kv_index)
    if softmax_scale is None:
        softmax_scale = (q.shape[-1] // heads) ** -0.5
    checks.positive("softmax_scale", softmax_scale)
    kind = q.device.type
    dtype = autocast.dtype_on(kind) or q.dtype
    q, k, v = (value.to(dtype) for value in (q, k, v))
    with autocast.off(kind):
        chosen = choose(q, k, v, heads, provider, backend)
        if chosen in ("reference", "triton"):
            op = overload("attention", q.device, chosen)
            return op(q, k, v, heads, float(softmax_scale), kv_index)[0]
        return attend(chosen, q, k, v, heads, float(softmax_scale), kv_index)
