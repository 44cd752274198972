"""A frozen weight in 8 or 4 bits a number, as the operators take it in place of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palp_fast.ops.registry import overload
from palp_fast.ops.scratch import in_shape
from palp_fast.reference.quantised import BLOCK, FORMATS, blocks_of


@dataclass(frozen=True, eq=False, repr=False)
class QuantisedWeight:
    """Codes and scales of a weight [d_out, ...], row by row; reference/quantised.py has the formats.

    codes: int8 [d_out, width], or NF4 codes, uint8 [d_out, 32 blocks]; scale: fp32 [d_out], or [d_out, blocks]. width:
    numbers in a row, d_in of a matrix, d_in h w of a convolution, whose rows are in the order h, w, d_in if
    channels_last. shape: of the weight; dtype: of the weight it was made from, dequantise's default.

    Raises TypeError or ValueError for codes, scales and shape that do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __post_init__(self):
        if self.codes.dtype not in FORMATS.values():
            raise TypeError(f"codes has dtype {self.codes.dtype}: allowed are torch.int8 and torch.uint8, for NF4")
        if self.scale.dtype != torch.float32:
            raise TypeError(f"scale has dtype {self.scale.dtype}: allowed is torch.float32")
        if len(self.shape) < 2 or (self.channels_last and len(self.shape) != 4):
            allowed = "[d_out, d_in, h, w]" if self.channels_last else "[d_out, d_in, ...]"
            raise ValueError(f"shape={list(self.shape)}: allowed is {allowed}")
        rows, blocks = self.shape[0], blocks_of(self.width)
        wanted = ((rows, self.width), (rows,)) if self.form == "int8" else ((rows, blocks * BLOCK // 2), (rows, blocks))
        for name, value, size in zip(("codes", "scale"), (self.codes, self.scale), wanted):
            if tuple(value.shape) != size:
                raise ValueError(f"{name} has shape {list(value.shape)}: allowed is {list(size)}")

    def __repr__(self) -> str:
        return f"QuantisedWeight({self.form}, shape={list(self.shape)})"

    @property
    def form(self) -> str:
        """ "int8" or "nf4"."""
        return "int8" if self.codes.dtype == torch.int8 else "nf4"

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape[1:])

    @property
    def device(self) -> torch.device:
        """Of codes and scales."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def dim(self) -> int:
        """Of the weight."""
        return len(self.shape)

    def to(self, device: torch.device | str) -> QuantisedWeight:
        """The same on another device."""
        return self._with(self.codes.to(device), self.scale.to(device), self.shape)

    def dequantise(self, dtype: torch.dtype | None = None, *, backend: str = "auto") -> Tensor:
        """The weight, dense, channels-last in memory if `channels_last`; every backend gives the same bits.

        backend: "auto" is bitsandbytes' kernel for NF4 on CUDA where it is installed and able, then Triton's. Raises
        RuntimeError if `backend` cannot serve.
        """
        op = torch.ops.palp_fast.dequantise.default
        if backend != "auto":
            op = overload("dequantise", self.device, backend)
        return in_shape(op(self.codes, self.scale, self.width, dtype or self.dtype), self.shape, self.channels_last)

    def rows(self, first: int, end: int) -> QuantisedWeight:
        """Some of its rows, a view."""
        shape = (min(end, self.shape[0]) - first, *self.shape[1:])
        return self._with(self.codes[first:end], self.scale[first:end], shape)

    def matrix(self) -> QuantisedWeight:
        """[d_out, width], a view: of a matrix itself, of a 1 x 1 convolution the product over channels."""
        return QuantisedWeight(self.codes, self.scale, (self.shape[0], self.width), self.dtype)

    def _with(self, codes: Tensor, scale: Tensor, shape: tuple[int, ...]) -> QuantisedWeight:
        return QuantisedWeight(codes, scale, shape, self.dtype, self.channels_last)

    @staticmethod
    def cat(weights: Sequence[QuantisedWeight]) -> QuantisedWeight:
        """The rows of all, one weight after another: of one format and row, on one device."""
        rows = sum(weight.shape[0] for weight in weights)
        codes, scale = (torch.cat(parts) for parts in zip(*((weight.codes, weight.scale) for weight in weights)))
        return weights[0]._with(codes, scale, (rows, *weights[0].shape[1:]))


Weight = Tensor | QuantisedWeight


def operands(weight: Weight) -> tuple[Tensor, tuple]:
    """(the tensor that an operator takes as its weight, the last arguments that say how it is quantised, if it is)."""
    if isinstance(weight, QuantisedWeight):
        return weight.codes, (weight.scale, list(weight.shape), weight.channels_last)
    return weight, ()
