"""Operators quantise_rows, int8_linear and fp16_linear: schema and shapes. They have no gradients."""

from __future__ import annotations

import torch

from palp_fast.ops.registry import empty, register
from palp_fast.ops.scratch import Scratch
from palp_fast.reference.inexact import fp16_linear_ref, int8_linear_ref, quantise_rows_ref

register(
    "quantise_rows",
    "(Tensor x) -> (Tensor, Tensor)",
    quantise_rows_ref,
    lambda x: (empty(x, x.shape, torch.int8), empty(x, x.shape[:1], torch.float32)),
    triton="inexact.quantise_rows",
)
register(
    "int8_linear",
    "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? low, Tensor? lora_b, "
    "ScalarType dtype) -> Tensor",
    int8_linear_ref,
    lambda codes, scale, weight, weight_scale, bias, low, lora_b, dtype: empty(codes, (len(codes), len(weight)), dtype),
    triton="inexact.int8_linear",
)
register(
    "fp16_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? low, Tensor? lora_b) -> Tensor",
    fp16_linear_ref,
    lambda x, weight, bias, low, lora_b: empty(x, (len(x), len(weight)), x.dtype),
    triton="inexact.fp16_linear",
    scratch=Scratch(weight=1, like=0),
)
