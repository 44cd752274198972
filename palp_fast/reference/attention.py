"""Softmax attention between projections: heads side by side in the last dimension, prompts shared by rows.

    out = softmax(scale q k^T) v,   lse = log sum exp(scale q k^T)   for every head

The backward pass rebuilds the weights from lse (Dao et al., arXiv 2205.14135, algorithm 4):

    p = exp(scale q k^T - lse),   delta = rowsum(grad out),   ds = p (grad v^T - delta)
    dq = scale ds k,   dk = scale ds^T q,   dv = p^T grad,    the last two summed over the rows of a prompt
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.reference.dtypes import compute_dtype


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, kv_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [B, N, heads D], k and v [P, M, heads D] -> (out as q, lse [B, heads, N] in the dtype of computing)."""
    scores = _scores(q, k, heads, scale, kv_index)
    lse = scores.logsumexp(dim=-1)
    out = (scores - lse[..., None]).exp() @ _split(_per_row(v, kv_index), heads)
    return _join(out, q.dtype), lse


def attention_bwd_ref(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float,
    kv_index: Tensor | None, need_kv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); dk and dv are empty unless need_kv."""
    weights = (_scores(q, k, heads, scale, kv_index) - lse[..., None]).exp()
    d_out = _split(grad, heads)
    delta = (d_out * _split(out, heads)).sum(dim=-1, keepdim=True)
    d_scores = scale * weights * (d_out @ _split(_per_row(v, kv_index), heads).mT - delta)
    dq = _join(d_scores @ _split(_per_row(k, kv_index), heads), q.dtype)
    if not need_kv:
        return dq, k.new_empty(0), v.new_empty(0)
    dk, dv = _join(d_scores.mT @ _split(q, heads)), _join(weights.mT @ d_out)
    return dq, _per_prompt(dk, k, kv_index), _per_prompt(dv, v, kv_index)


def _scores(q: Tensor, k: Tensor, heads: int, scale: float, kv_index: Tensor | None) -> Tensor:
    return scale * (_split(q, heads) @ _split(_per_row(k, kv_index), heads).mT)


def _split(value: Tensor, heads: int) -> Tensor:
    """[B, N, heads D] -> [B, heads, N, D] to compute with."""
    width = value.shape[-1] // heads
    return value.to(compute_dtype([value])).unflatten(-1, (heads, width)).transpose(1, 2)


def _join(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, heads, N, D] -> [B, N, heads D]."""
    return value.transpose(1, 2).flatten(-2).to(dtype or value.dtype).contiguous()


def _per_row(value: Tensor, kv_index: Tensor | None) -> Tensor:
    return value if kv_index is None else value.index_select(0, kv_index)


def _per_prompt(rows: Tensor, like: Tensor, kv_index: Tensor | None) -> Tensor:
    """Sum of the rows of each prompt. A product with 0 and 1 adds in the same order every time, index_add may not."""
    if kv_index is not None:
        prompts = torch.arange(like.shape[0], device=like.device)
        rows = torch.tensordot((prompts[:, None] == kv_index).to(rows.dtype), rows, dims=1)
    return rows.to(like.dtype)
