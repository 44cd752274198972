"""bitsandbytes' own kernel for NF4 weights, where it is installed and runs on the card."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from palp_fast.reference.quantised import BLOCK, dequantise_ref


def serves(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether it serves codes of this format and device in this dtype."""
    if codes.dtype != torch.uint8 or codes.device.type != "cuda" or dtype == torch.float64:
        return False
    return obstacle(codes.device) is None


@lru_cache
def obstacle(device: torch.device) -> str | None:
    """Why it does not serve a device, or None: a block is tried once."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    codes = torch.arange(BLOCK // 2, device=device).mul_(8).to(torch.uint8)[None]
    scale = torch.full((1, 1), 0.7, device=device)
    try:
        found = dequantise(codes, scale, BLOCK, torch.float16)
    except Exception as error:  # it fails in many ways where its library does not fit torch, driver or card
        return f"bitsandbytes fails on {device}: {error}"
    return None if torch.equal(found, dequantise_ref(codes, scale, BLOCK, torch.float16)) else "its values are others"


def dequantise(codes: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """As dequantise_ref, for NF4."""
    import bitsandbytes  # noqa: F401  (registers its operators)

    shape = [scale.shape[0], scale.shape[1] * BLOCK]
    rows = torch.ops.bitsandbytes.dequantize_4bit(codes, scale.flatten(), BLOCK, "nf4", shape, dtype)
    return rows[:, :width].contiguous()
