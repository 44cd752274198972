"""What plain PyTorch takes inside of an operator on a CPU, beside inputs and result; kernels of our own take nothing.

In fp32 numbers for each number of the result (softmax attention: of the scores), forward and backward, where the
operator's inputs have 32 bits and where they have 16 and are widened first: read off palp_fast/reference.
"""

from __future__ import annotations

import torch

from palp_fast import backend

_FP32 = 4
_NUMBERS = {
    "geglu": ((1, 2), (4, 7)),
    "group_norm": ((1, 3), (3, 5)),
    "layer_norm": ((0, 2), (2, 5)),
    "lora_linear": ((2, 0), (3, 3)),
    "lora_projections": ((0, 1), (2, 3)),
    "attention": ((3, 5), (3, 5)),
}
_OPERATORS = {"group_norm": "group_norm_silu"}  # those of another name


def plain(cfg) -> frozenset[str]:
    """The kinds of operators that plain PyTorch computes in a training."""
    if cfg.device != "cpu":
        return frozenset()
    asked, cpu = "reference" if cfg.backend == "reference" else "auto", torch.device("cpu")
    served = {kind: backend.select(_OPERATORS.get(kind, kind), cpu, asked) for kind in _NUMBERS}
    return frozenset(kind for kind, server in served.items() if server == "reference")


def inner(kind: str, numbers: int, itemsize: int, plain: frozenset[str]) -> dict[str, int]:
    """{"scratch", "back": bytes} of an operator with so many numbers in its result; plain: as of the function."""
    forward, backward = _NUMBERS[kind][itemsize < _FP32] if kind in plain else (0, 0)
    return {"scratch": forward * numbers * _FP32, "back": backward * numbers * _FP32}
