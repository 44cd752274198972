"""Operators of the timestep sampler, and the bare random words that tests hold against known answers.

None has a gradient. They are called by palp_fast/sampler.py; functional.py has no name for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palp_fast.ops.registry import register
from palp_fast.reference.philox import philox_words_ref
from palp_fast.reference.timestep import timestep_sample_ref, timestep_update_ref


def _sample_fake(residual_scale, counts, squares, step, sample_offset, seed, batch, *_):
    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty((batch,), dtype=dtype, device=residual_scale.device)

    return empty(torch.int64), empty(torch.float32), empty(torch.float32)


register(
    "timestep_sample",
    "(Tensor residual_scale, Tensor counts, Tensor squares, Tensor step, Tensor sample_offset, int seed, SymInt batch, "
    "SymInt global_batch, int mode, float floor) -> (Tensor, Tensor, Tensor)",
    timestep_sample_ref,
    _sample_fake,
)
register(
    "timestep_update",
    "(Tensor(a!) counts, Tensor(b!) squares, Tensor t, Tensor norms, int timesteps, float memory) -> ()",
    timestep_update_ref,
    lambda *_: None,
)
register(
    "philox_words",
    "(Tensor counters, Tensor key) -> Tensor",
    philox_words_ref,
    lambda counters, key: torch.empty_like(counters),
)
