"""Tiles of group_norm_silu: [pixels, groups, channels of a group], of a tensor [B, C, pixels] of any strides.

In channels-last several groups side by side are one contiguous run; in contiguous tensors the pixels are. Chunks of
pixels depend on the shape of one sample alone, so that results do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from palp_fast.kernels.launch import launch, settings


@dataclass(frozen=True)
class Launch:
    """Sizes in elements, those masked off included."""

    ON_CHIP: int = 16384  # most that a block of the one-pass kernels holds, of all the tensors that it reads
    PER_THREAD: int = 64  # what a thread of theirs holds
    TILE: int = 2048  # of a block of the two-pass kernels
    ROW: int = 256  # of its tile along the channels, in channels-last
    CHUNKS: int = 64  # most that the pixels of a sample are split into
    num_warps: int = 4  # of a block of the two-pass kernels


LAUNCHES = {"generic": Launch()}


@dataclass(frozen=True)
class Plan:
    """A tile, and how often it is laid: blocks of groups, chunks of `chunk` pixels. chunks 0: one pass, no chunks."""

    BLOCK_P: int
    BLOCK_G: int
    BLOCK_D: int
    blocks: int
    chunk: int
    chunks: int
    num_warps: int


def plan(x: Tensor, groups: int, held: int) -> Plan:
    """For x [B, C, pixels]; held: how many such tensors a one-pass kernel has on chip."""
    chosen, width, pixels = settings(LAUNCHES, x.device), x.shape[1] // groups, x.shape[2]
    whole, block_d = triton.next_power_of_2(pixels), triton.next_power_of_2(width)
    block_g = _groups_of_whole_sectors(width, groups) if x.stride(1) == 1 else 1
    while block_g > 1 and held * whole * block_g * block_d > chosen.ON_CHIP:
        block_g //= 2
    if (elements := held * whole * block_g * block_d) <= chosen.ON_CHIP:
        warps = min(16, max(1, elements // (32 * chosen.PER_THREAD)))
        return Plan(whole, block_g, block_d, triton.cdiv(groups, block_g), pixels, 0, warps)
    if x.stride(1) == 1:
        block_g = min(triton.next_power_of_2(groups), max(1, chosen.ROW // block_d))
    block_p = max(1, chosen.TILE // (block_g * block_d))
    chunk = block_p * triton.cdiv(triton.cdiv(pixels, block_p), chosen.CHUNKS)
    blocks, chunks = triton.cdiv(groups, block_g), triton.cdiv(pixels, chunk)
    return Plan(block_p, block_g, block_d, blocks, chunk, chunks, chosen.num_warps)


def _groups_of_whole_sectors(width: int, groups: int) -> int:
    """The fewest groups whose channels are a multiple of 16: 32 bytes, a sector of the cache, in 16-bit dtypes."""
    aligned = width & -width
    return min(max(1, 16 // aligned), triton.next_power_of_2(groups))


def flat(x: Tensor) -> Tensor:
    """[B, C, ...] -> [B, C, pixels]: a view where strides allow it."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def launch_tiles(kernel, laid: Plan, like: Tensor, groups: int, *args, **constants) -> None:
    """Launches on [B, C, pixels] tensors like `like`; args follow the pointers."""
    width = like.shape[1] // groups
    grid = (laid.blocks * max(1, laid.chunks) * like.shape[0],)
    launch(kernel, grid, like, *args, WIDTH=width, BLOCK_P=laid.BLOCK_P, BLOCK_G=laid.BLOCK_G, BLOCK_D=laid.BLOCK_D,
           **constants, num_warps=laid.num_warps)


@triton.jit
def place(blocks, chunks, FROM_END: tl.constexpr = False):
    """Block of groups, chunk and sample of this program, or those of the last but as many."""
    pid = tl.program_id(0)
    if FROM_END:
        pid = tl.num_programs(0) - 1 - pid
    return pid % blocks, pid // blocks % chunks, (pid // blocks // chunks).to(tl.int64)


@triton.jit
def tile(i_g, groups, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr):
    """Pixels [P, 1, 1]; groups [1, G, 1]; channels [1, G, D], counted from the block's first, and which exist."""
    o_g = tl.arange(0, BLOCK_G)[None, :, None]
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    o_p = tl.arange(0, BLOCK_P)[:, None, None]
    return o_p, i_g * BLOCK_G + o_g, o_g * WIDTH + o_d, (i_g * BLOCK_G + o_g < groups) & (o_d < WIDTH)


@triton.jit
def start(p, i_b, pixel, channel, s_b, s_c, s_p):
    """Address of a pixel and channel of sample i_b."""
    return p + i_b * s_b + pixel.to(tl.int64) * s_p + channel.to(tl.int64) * s_c


@triton.jit
def channel_values(p, channel, o_c, m_c, absent: tl.constexpr, COMPUTE: tl.constexpr):
    """Weights or biases [1, G, D], or `absent` where there are none."""
    if p is None:
        return tl.full(o_c.shape, absent, COMPUTE)
    else:
        return tl.load(p + channel + o_c, m_c, other=0).to(COMPUTE)


@triton.jit
def group_sum(b):
    """[P, G, D] -> [1, G, 1]."""
    return tl.sum(tl.sum(b, 0, keep_dims=True), 2, keep_dims=True)
