"""AdamW and Lion with 8-bit state, and AdamW in 32 bits: one step for all tensors, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from palp_fast.optim_flat import FlatOptimizer

__all__ = ["AdamW", "AdamW8bit", "Lion8bit"]


class AdamW8bit(FlatOptimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with block-wise 8-bit moments (Dettmers et al., 2110.02861).

    Decay first, update from the new moments before they are quantised, then quantise: first moment with a signed,
    second with an unsigned dynamic map, blocks of `block_size` elements (a power of two) with one fp32 scale each.
    Tensors with fewer than `min_8bit_size` elements keep fp32 moments. max_grad_norm clips by the norm over all groups.
    capturable: step() may be captured in a CUDA graph; see refresh(). shadows: {parameter: fp16 or bf16 tensor of its
    shape}, copies of the parameters that every step writes. Raises ValueError naming a bad argument.
    """

    RULE = "adamw"
    MOMENTS = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 0,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        shadows: Mapping[Tensor, Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"block_size": block_size, "min_8bit_size": min_8bit_size}
        super().__init__(params, defaults, max_grad_norm, capturable, shadows, backend)


class Lion8bit(FlatOptimizer):
    """Lion (Chen et al., arXiv 2302.06675) with a block-wise 8-bit moment; state, clipping and errors as AdamW8bit."""

    RULE = "lion"
    MOMENTS = {"exp_avg": True}

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        min_8bit_size: int = 0,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        shadows: Mapping[Tensor, Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        defaults |= {"block_size": block_size, "min_8bit_size": min_8bit_size}
        super().__init__(params, defaults, max_grad_norm, capturable, shadows, backend)


class AdamW(FlatOptimizer):
    """AdamW with fp32 moments and the step of AdamW8bit: the yardstick. Its state_dict is that of torch.optim.AdamW."""

    RULE = "adamw"
    MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
    SHAPED = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        shadows: Mapping[Tensor, Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"block_size": 256, "min_8bit_size": 0}
        super().__init__(params, defaults, max_grad_norm, capturable, shadows, backend)
