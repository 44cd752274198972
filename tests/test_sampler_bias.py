"""Timestep sampler: the weighted mean of any test function is that over the schedule, in every mode."""

import pytest
import torch
from close import BACKENDS

from palp_fast.sampler import MODES, TimestepSampler

T = 1000
ALPHAS = torch.linspace(0.999, 0.005, T)
GRID = torch.arange(T, dtype=torch.float64)
FUNCTIONS = torch.stack([
    torch.ones(T, dtype=torch.float64),
    GRID / T,
    torch.sin(GRID / 150) * (GRID / T) ** 2,
    torch.exp(-GRID / 30),
    GRID % 2,
    ((GRID > 300) & (GRID < 340)).double(),
    (GRID == 0).double(),
    (GRID == T - 1).double(),
])


def norm_of(t):
    return 0.1 + 5 * torch.exp(-t / 100)


def trained(mode, **options):
    sampler = TimestepSampler(ALPHAS, mode, **options)
    for step in range(20):
        t, _, _ = sampler.sample(32, step)
        sampler.update(t, norm_of(t))
    return sampler


def assert_unbiased(means):
    """means [independent repetitions, first functions]: to 4 standard errors, or the rounding of weights to fp32."""
    truth = FUNCTIONS[: means.shape[1]].mean(1)
    error = 4 * means.std(0) / len(means) ** 0.5 + 1e-7
    difference = (means.mean(0) - truth).abs()
    assert (difference <= error).all(), (difference, error)


# A seed of its own for every repetition: strata tie steps together, and a standard error needs independent ones.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1000, 700])
def test_a_million_draws(mode, batch):
    sampler, means = trained(mode), []
    for step in range(1_000_000 // batch):
        sampler.seed = step
        t, weight, _ = sampler.sample(batch, step)
        means.append((FUNCTIONS[:, t] * weight).mean(1))
    assert_unbiased(torch.stack(means))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_batches(mode, batch, backend):
    sampler, means = trained(mode, backend=backend), []
    for step in range(4000 if backend == "cpu" else 500):
        sampler.seed = step
        t, weight, _ = sampler.sample(batch, step)
        means.append((FUNCTIONS[:6, t] * weight).mean(1))  # the others are too rare for a standard error
    assert_unbiased(torch.stack(means))


def test_every_timestep_of_a_long_adaptive_run():
    """The histogram is unbiased, too: 10^6 draws, the greatest of 1000 differences within 5 standard errors."""
    sampler, histograms = trained("adaptive"), []
    for step in range(1000):
        sampler.seed = step
        t, weight, _ = sampler.sample(1000, step)
        histograms.append(torch.bincount(t, weights=weight.double(), minlength=T))
    histograms = torch.stack(histograms)
    assert ((histograms.mean(0) - 1).abs() <= 5 * histograms.std(0) / 1000**0.5).all()


def test_statistics_that_follow_the_draws_add_no_bias():
    """Runs of 10 steps from nothing, each step's q from the steps before: the mean over all of them is unbiased."""
    means = []
    for run in range(400):
        sampler, values = TimestepSampler(ALPHAS, "adaptive", seed=run), []
        for step in range(10):
            t, weight, _ = sampler.sample(4, step)
            values.append((FUNCTIONS[:6, t] * weight).mean(1))
            sampler.update(t, norm_of(t) * weight)
        means.append(torch.stack(values).mean(0))
    assert_unbiased(torch.stack(means))


def spread(mode, batch, values, **options):
    sampler, means = trained(mode, **options), []
    for step in range(2000):
        sampler.seed = step
        t, weight, _ = sampler.sample(batch, step)
        means.append((values[t] * weight).mean())
    return torch.stack(means).std().item()


def test_modes_lower_the_variance():
    """A smooth function needs strata; a peaked one, as gradient norms are, a proposal of its shape."""
    smooth, peaked = FUNCTIONS[1], norm_of(GRID)
    # Four strata of a linear function: a quarter of the standard deviation.
    assert spread("stratified", 4, smooth) < 0.3 * spread("uniform", 4, smooth)
    assert spread("adaptive", 4, peaked) < 0.5 * spread("uniform", 4, peaked)
