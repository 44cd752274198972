"""Timestep sampler: wrong input gives an error that names the argument, its value and what is allowed."""

import pytest
import torch
from close import NEEDS_LIBRARY

from palp_fast.sampler import TimestepSampler

T = 1000
ALPHAS = torch.linspace(0.999, 0.005, T)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ALPHAS, "random"), {}, "mode='random': allowed are 'uniform', 'stratified', 'adaptive'"),
        ((torch.tensor([0.5, 0.0]), "uniform"), {}, r"alphas_cumprod has values from 0.0 to 0.5.*\(0, 1\]"),
        ((torch.tensor([0.5, 1.5]), "uniform"), {}, r"alphas_cumprod has values from 0.5 to 1.5.*\(0, 1\]"),
        ((torch.ones(2, 2), "uniform"), {}, r"alphas_cumprod has shape \[2, 2\]"),
        ((torch.ones(0), "uniform"), {}, r"alphas_cumprod has shape \[0\]"),
        ((torch.ones(2, dtype=torch.int64), "uniform"), {}, "alphas_cumprod has dtype torch.int64"),
        ((ALPHAS, "uniform"), {"rescale": "no"}, "rescale='no': allowed are True and False"),
        ((ALPHAS, "uniform"), {"bins": 0}, "bins=0: allowed is an int from 1 to 1024"),
        ((ALPHAS, "uniform"), {"bins": 1025}, "bins=1025: allowed is an int from 1 to 1024"),
        ((ALPHAS, "uniform"), {"floor": 0.0}, "floor=0.0"),
        ((ALPHAS, "uniform"), {"seed": 0.5}, "seed=0.5: allowed is an int"),
        ((ALPHAS, "uniform"), {"seed": 2**63}, f"seed={2**63}: allowed is a 64-bit int"),
    ],
)
def test_bad_arguments_are_named(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TimestepSampler(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((-1, 0), {}, "batch=-1: allowed is an int >= 0"),
        ((2.0, 0), {}, "batch=2.0"),
        ((4, 0), {"global_batch": 3}, "global_batch=3: allowed is an int from 4 to 2147451"),
        ((4, 0), {"global_batch": 2**31}, "global_batch=2147483648: allowed is an int from 4 to 2147451"),
        ((4, 0.5), {}, "step=0.5"),
        ((4, torch.tensor([1])), {}, r"step is torch.int64 of shape \[1\]"),
        ((4, 0, torch.tensor(1.0)), {}, "sample_offset is torch.float32"),
        ((4, torch.tensor(1, device="meta")), {}, "step is on meta"),
    ],
)
def test_bad_draws_are_named(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TimestepSampler(ALPHAS, "uniform").sample(*arguments, **options)


@pytest.mark.parametrize(
    ("t", "norms", "message"),
    [
        (torch.tensor([1, 2]), torch.ones(3), r"t has shape \[2\]: allowed is \[3\]"),
        (torch.tensor([1.0]), torch.ones(1), "t: torch.float32 given"),
        (torch.tensor([1]), torch.ones(1, dtype=torch.int32), "norms has dtype torch.int32"),
        (torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1), r"norms has shape \[1, 1\]: allowed is \[N\]"),
        (torch.tensor([1]), torch.ones(1, device="meta"), "norms is on meta"),
    ],
)
def test_bad_statistics_are_named(t, norms, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TimestepSampler(ALPHAS, "uniform").update(t, norms)


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.zeros(0, dtype=torch.float64)}, "counts has 0 bins: allowed are 1 to 1024"),
        ({"counts": torch.zeros(32)}, "counts: allowed is a contiguous float64 vector of 32"),
        ({"squares": torch.zeros(31, dtype=torch.float64)}, "squares: allowed is a contiguous float64 vector of 32"),
        ({"global_batch": 0}, "global_batch=0: allowed is 1 to"),
        ({"global_batch": 2**31}, "global_batch=2147483648: allowed is 1 to 2147451"),
        ({"batch": -1}, "batch=-1"),
        ({"mode": 3}, "mode=3"),
    ],
)
def test_the_library_itself_reads_nothing_outside(change, message):
    zeros = torch.zeros(32, dtype=torch.float64)
    arguments = {
        "residual_scale": torch.ones(T), "counts": zeros, "squares": zeros, "step": torch.tensor(0),
        "sample_offset": torch.tensor(0), "seed": 0, "batch": 4, "global_batch": 4, "mode": 1, "floor": 0.1, **change}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.palp_fast.timestep_sample.default(*arguments.values())
