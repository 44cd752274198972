"""Timestep sampler: unbiased in every mode, reproducible, the same on one rank or many."""

import pytest
import torch

from palp_fast.sampler import MODES, TimestepSampler

T = 1000
ALPHAS = torch.linspace(0.999, 0.005, T)


def trained(mode: str, **options) -> TimestepSampler:
    """A sampler whose statistics (used by adaptive only) say that small t has large gradients."""
    sampler = TimestepSampler(ALPHAS, mode, **options)
    for step in range(20):
        t, _, _ = sampler.sample(32, step)
        sampler.update(t, 0.1 + 5 * torch.exp(-t / 100))
    return sampler


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 100])
def test_weighted_mean_is_unbiased(mode, batch):
    # A seed of its own for every step: strata tie steps together, and 4 standard errors need independent ones.
    count, values = 800 if batch == 1 else 200, []
    sampler = trained(mode)
    for step in range(count):
        sampler.seed = step
        t, weight, _ = sampler.sample(batch, step)
        values.append((weight * torch.sin(t / 150) * (t / T) ** 2).double().mean())
    values = torch.stack(values)
    t = torch.arange(T, dtype=torch.float64)
    truth = (torch.sin(t / 150) * (t / T) ** 2).mean()
    standard_error = values.std() / count**0.5
    assert abs(values.mean() - truth) < 4 * standard_error


def test_stratified_covers_the_schedule_over_consecutive_steps():
    sampler = TimestepSampler(ALPHAS, "stratified")
    t = torch.cat([sampler.sample(4, step)[0] for step in range(8)])
    assert (t * 32 // T).sort().values.tolist() == list(range(32))


def test_stratified_covers_the_schedule_over_a_large_batch():
    t, weight, _ = TimestepSampler(ALPHAS, "stratified").sample(100, 3)
    assert (t // 10).sort().values.tolist() == list(range(100))
    assert torch.equal(weight, torch.ones(100))


@pytest.mark.parametrize("mode", MODES)
def test_draws_do_not_depend_on_ranks(mode):
    sampler = trained(mode)
    whole = sampler.sample(8, 5, global_batch=8)
    parts = [sampler.sample(2, torch.tensor(5), torch.tensor(start), global_batch=8) for start in (0, 2, 4, 6)]
    for index, value in enumerate(whole):
        assert torch.equal(value, torch.cat([part[index] for part in parts]))


def test_draws_differ_between_seeds_steps_and_samples():
    sampler = TimestepSampler(ALPHAS, "uniform")
    other = TimestepSampler(ALPHAS, "uniform", seed=1)
    assert not torch.equal(sampler.sample(8, 0)[0], other.sample(8, 0)[0])
    assert not torch.equal(sampler.sample(8, 0)[0], sampler.sample(8, 1)[0])
    assert sampler.sample(64, 0)[0].unique().numel() > 50


def test_adaptive_weights_are_bounded_and_favour_large_gradients():
    sampler = trained("adaptive", floor=0.25)
    t, weight, _ = sampler.sample(4096, 100)
    assert weight.max() <= 1 / 0.25 + 1e-6
    assert (t < 200).double().mean() > 0.35
    assert torch.allclose(sampler.proposal().sum(), torch.ones((), dtype=torch.float64))


def test_adaptive_starts_uniform_and_ignores_non_finite_norms():
    sampler = TimestepSampler(ALPHAS, "adaptive")
    start = sampler.proposal()
    sampler.update(torch.tensor([3, 900]), torch.tensor([float("nan"), float("inf")]))
    assert torch.equal(sampler.proposal(), start)
    assert torch.equal(sampler.sample(16, 0)[1], torch.ones(16))


def test_residual_scale():
    t, _, scale = TimestepSampler(ALPHAS, "uniform", rescale=False).sample(32, 0)
    assert torch.allclose(scale, ((1 - ALPHAS[t]) / ALPHAS[t]).sqrt())
    assert torch.equal(TimestepSampler(ALPHAS, "uniform").sample(32, 0)[2], torch.ones(32))


def test_state_round_trip_continues_the_run():
    sampler = trained("adaptive")
    copy = TimestepSampler(ALPHAS, "adaptive")
    copy.load_state_dict(sampler.state_dict())
    for mine, its in zip(sampler.sample(8, 50), copy.sample(8, 50)):
        assert torch.equal(mine, its)
    with pytest.raises(ValueError, match="counts"):
        TimestepSampler(ALPHAS, "adaptive", bins=16).load_state_dict(sampler.state_dict())


def test_short_schedule_and_empty_batch():
    sampler = TimestepSampler(torch.tensor([0.9, 0.5, 0.1]), "adaptive")
    assert set(sampler.sample(64, 0)[0].tolist()) == {0, 1, 2}
    assert sampler.sample(0, 0)[0].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((ALPHAS, "random"), {}, "mode"),
        ((torch.tensor([0.5, 0.0]), "uniform"), {}, "alphas_cumprod"),
        ((torch.ones(2, 2), "uniform"), {}, "alphas_cumprod"),
        ((torch.ones(2, dtype=torch.int64), "uniform"), {}, "alphas_cumprod"),
        ((ALPHAS, "uniform"), {"bins": 0}, "bins"),
        ((ALPHAS, "uniform"), {"floor": 0.0}, "floor"),
        ((ALPHAS, "uniform"), {"seed": 0.5}, "seed"),
    ],
)
def test_bad_arguments_are_named(arguments, options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        TimestepSampler(*arguments, **options)
