"""Which dimension of an image tensor lies contiguous in memory, and tensors laid out alike."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether the channels of x [B, C, ...] are neighbours in memory: channels-last, whole or a slice of it."""
    return x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def empty_image(x: Tensor, shape, last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Dense, uninitialised [B, C, ...] on the device of x, channels-last or contiguous; dtype that of x by default."""
    batch, channels, *pixels = shape
    dense = (batch, *pixels, channels) if last else (batch, channels, *pixels)
    made = torch.empty(dense, dtype=dtype or x.dtype, device=x.device)
    return made.movedim(-1, 1) if last else made


def empty_in_layout_of(x: Tensor) -> Tensor:
    """Dense, uninitialised, of the shape and dtype of x, channels-last if x is, else contiguous."""
    return empty_image(x, x.shape, channels_last(x))


def in_layout(value: Tensor, last: bool) -> Tensor:
    """value [B, C, ...] dense, channels-last or contiguous; value itself if it is that already."""
    if not last:
        return value.contiguous()
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value
    return value.movedim(1, -1).contiguous().movedim(-1, 1)
