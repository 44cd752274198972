"""The operators: formula, shapes, checks. Each runs on the best backend for its device (see backend.py).

Floating inputs may be fp16, bf16, fp32 or fp64, each its own, and of any strides. Arithmetic is fp32, or fp64 when
an image-shaped input is fp64; results are rounded once. A bad argument raises ValueError or TypeError naming
the argument, its value and what is allowed. Values of tensors are checked on the CPU alone, and never read back from
another device.
"""

from palp_fast import ops as _ops  # noqa: F401  (registers the operators)
from palp_fast.functional.attention import attention
from palp_fast.functional.frozen import geglu, group_norm_silu, layer_norm
from palp_fast.functional.inexact import inexact_products
from palp_fast.functional.lora import lora_linear, lora_projections
from palp_fast.functional.lora_attention import lora_attention
from palp_fast.functional.noise import add_noise, renoise
from palp_fast.functional.products import frozen_conv2d, frozen_linear
from palp_fast.functional.quantise import quantise
from palp_fast.functional.score import score_combination, score_residual
from palp_fast.functional.weights import AttentionWeights, Projections
from palp_fast.quantised import QuantisedWeight

__all__ = [
    "AttentionWeights", "Projections", "QuantisedWeight", "add_noise", "attention", "frozen_conv2d", "frozen_linear",
    "geglu", "group_norm_silu", "inexact_products", "layer_norm", "lora_attention", "lora_linear", "lora_projections",
    "quantise", "renoise", "score_combination", "score_residual",
]
