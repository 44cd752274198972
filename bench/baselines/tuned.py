"""The plain step made as fast as its own tools allow: channels-last, both predictions of a guidance pair as one batch,
torch.compile, fused AdamW. Its gradient is that of bench/baselines/plain.py.
"""

from __future__ import annotations

import torch

from bench.baselines.plain import PlainModel

# What is compiled: nothing, the transformer blocks once for all (diffusers' regional compilation), or the whole UNet.
MODES = ("eager", "blocks", "whole", "reduce-overhead")


def tune(model: PlainModel, mode: str) -> PlainModel:
    """Changes `model` in place and returns it. mode: one of MODES, "reduce-overhead" captures CUDA graphs."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: allowed are {', '.join(map(repr, MODES))}")
    model.guide = guided_together
    unet = model.unet.to(memory_format=torch.channels_last)
    # With and without adapters, with and without gradient, one and two samples, four widths: each is compiled.
    torch._dynamo.config.recompile_limit = 128
    if mode == "blocks":
        unet.compile_repeated_blocks(dynamic=False)
    elif mode != "eager":
        unet.compile(dynamic=False, mode="reduce-overhead" if mode == "reduce-overhead" else None)
    return model


def guided_together(eps, condition, empty, scale):
    """Classifier-free guidance, eq. 5, from one pass: eps(condition, copies) predicts for several at once."""
    if scale in (0, 1):
        return eps(condition if scale else empty)
    batch = [torch.stack(pair) for pair in zip(condition, empty)]  # [2, 1, ...]: all samples of one, then of the other
    conditional, unconditional = eps(tuple(batch), 2).chunk(2)
    return unconditional + scale * (conditional - unconditional)
