"""What plain PyTorch takes inside of an operator on a CPU, beside inputs and result; Triton kernels take nothing.

In fp32 numbers for each number of the result (softmax attention: of the scores), forward and backward, where the
operator's inputs have 32 bits and where they have 16 and are widened first: read off palp_fast/reference.
"""

from __future__ import annotations

_FP32 = 4
_NUMBERS = {
    "geglu": ((1, 2), (4, 7)),
    "group_norm": ((1, 3), (3, 5)),
    "layer_norm": ((0, 2), (2, 5)),
    "lora_linear": ((2, 0), (3, 3)),
    "lora_projections": ((0, 1), (2, 3)),
    "attention": ((3, 5), (3, 5)),
}


def inner(kind: str, numbers: int, itemsize: int, on_card: bool) -> dict[str, int]:
    """{"scratch", "back": bytes} of an operator with so many numbers in its result."""
    forward, backward = (0, 0) if on_card else _NUMBERS[kind][itemsize < _FP32]
    return {"scratch": forward * numbers * _FP32, "back": backward * numbers * _FP32}
