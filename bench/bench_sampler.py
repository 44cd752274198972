"""The timestep sampler, one optimizer step: draws and statistics.

Bytes: t, weight and scale are written and t and the norm read (28 a sample), two statistics of 8 bytes in 32 bins are
read twice and written once; next to nothing, so what counts is the time of a call.
"""

import torch

from bench.core import Operator, Problem
from palp_fast.sampler import MODES, TimestepSampler

SHAPES = {f"{mode}, batch {batch}": (mode, batch) for batch in (4, 1, 32, 512) for mode in reversed(MODES)}
OTHER_DRAWS = "torch.randint draws other timesteps: nothing to compare with"


def make(mode, batch, dtype, device):
    others = {"alphas": torch.linspace(0.999, 0.005, 1000, device=device), "mode": mode, "batch": batch}
    return Problem((), others | {"step": torch.tensor(3, device=device)}, 28 * batch + 48 * 32)


def ours(problem, backend):
    some = problem.others
    sampler = TimestepSampler(some["alphas"].float(), some["mode"], backend=backend)

    def step():
        t, weight, scale = sampler.sample(some["batch"], some["step"])
        sampler.update(t, weight)
        return t, weight, scale

    return step


PROVIDERS: dict = {}  # no other library has one
OPERATORS = [
    Operator(
        "sampler", SHAPES, make, lambda problem: ours(problem, "reference"), ours, PROVIDERS,
        registered=("timestep_sample", "timestep_update"), yardstick="palp_fast reference", calls=4,
        refused={"eager": OTHER_DRAWS, "torch.compile": OTHER_DRAWS}, dtypes=(torch.float32,)),
]
