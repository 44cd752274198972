"""Philox-4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") in int64 tensors.

A counter of four 32-bit words under a key of two gives four random words: no state, so any element of any
draw can be made alone, on any device, in any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

STREAM_NOISE = 0
STREAM_TIMESTEP = 1
STREAM_STRATA = 2

Word = Tensor | int


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words in [0, 2^32), as int64 tensors of the counter's broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(constant: int, word: Word) -> tuple[Word, Word]:
    """High and low half of a 32 x 32 bit product, by 16-bit halves: int64 holds no unsigned 64-bit product."""
    low = constant * (word & 0xFFFF)
    middle = constant * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def seed_key(seed: Word) -> tuple[Word, Word]:
    """The two key words of a 64-bit seed; a negative one counts by its two's complement."""
    return seed & MASK, (seed >> 32) & MASK


def words(first: Tensor, sample: Tensor, step: Word, stream: int, seed: Word) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The project's use of the counter: (element / 4, sample, step, stream), key = seed."""
    return philox((first & MASK, sample & MASK, step & MASK, stream), seed_key(seed))


def philox_words_ref(counters: Tensor, key: Tensor) -> Tensor:
    """Rows of four random words [N, 4] for rows of counters [N, 4] under one key [2]; words held in int64."""
    return torch.stack(philox(tuple((counters & MASK).unbind(1)), tuple((key & MASK).unbind(0))), dim=1)


def normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent N(0, 1) fp32 draws from two words, by Box-Muller."""
    # (word + 1/2) / 2^32 lies in (0, 1], so the logarithm is finite.
    uniform = first.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2 * uniform.log()).sqrt()
    # The nearest quarter turn is taken off in integers, where nothing is rounded.
    quarter = (second + 2**29) >> 30
    angle = (second - (quarter << 30)).to(torch.float32) * (2 * math.pi * 2.0**-32)
    cos, sin = angle.cos(), angle.sin()
    is_odd = quarter % 2 == 1
    x, y = torch.where(is_odd, -sin, cos), torch.where(is_odd, cos, sin)
    radius = torch.where(quarter & 2 == 2, -radius, radius)
    return radius * x, radius * y


def normal(samples: Tensor, count: int, step: Word, seed: Word, stream: int = STREAM_NOISE) -> Tensor:
    """[B, count] fp32 N(0, 1): row b belongs to sample number samples[b] (int64), whatever the batch."""
    quads = torch.arange((count + 3) // 4, dtype=torch.int64, device=samples.device)
    w0, w1, w2, w3 = words(quads[None, :], samples[:, None], step, stream, seed)
    draws = torch.stack([*normal_pair(w0, w1), *normal_pair(w2, w3)], dim=-1)
    return draws.flatten(1)[:, :count]
