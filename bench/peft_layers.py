"""Attention layers with LoRA as peft adds it, on given weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.core import need
from bench.layers import RANK


class Projections(nn.Module):
    """Linear layers of one input, in the dtype of their weights: [d_out, d_in] each, and biases or None."""

    def __init__(self, weights: dict[str, Tensor], biases: dict[str, Tensor]):
        super().__init__()
        for name, weight in weights.items():
            layer = nn.Linear(*reversed(weight.shape), bias=name in biases, dtype=weight.dtype, device=weight.device)
            layer.weight.data = weight
            if name in biases:
                layer.bias.data = biases[name]
            setattr(self, f"to_{name}", layer)


class Attention(Projections):
    """As diffusers computes it: projections, torch's attention, out projection; context None: self-attention."""

    def __init__(self, weights: dict[str, Tensor], biases: dict[str, Tensor], heads: int):
        super().__init__(weights, biases)
        self.heads = heads

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, N, d], context [B, M, d_c] -> [B, N, d]."""
        context = x if context is None else context
        made = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in made)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))


def with_lora(module: Projections, factors: list[Tensor]) -> list[nn.Parameter]:
    """Adds adapters of scale 1 with the values of `factors`, a and b of each projection -> their parameters in order.

    Raises Unavailable where peft is not installed.
    """
    need("peft")
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, _ in module.named_children()]
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), module)
    layers = [getattr(module, name) for name in names]
    found = [factor["default"].weight for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    for parameter, factor in zip(found, factors, strict=True):
        parameter.data = factor.detach().clone()
    return found


def lora_factors(d_in: int, d_out: int, device: torch.device) -> list[Tensor]:
    """a [r, d_in] and b [d_out, r], fp32, of sizes that leave the low-rank term visible."""
    return [torch.randn(RANK, d_in, device=device) * d_in**-0.5, 0.1 * torch.randn(d_out, RANK, device=device)]
