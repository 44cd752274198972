"""Timestep sampler: strata, ranks, state, and the compiled library against the reference bit for bit."""

import pytest
import torch
from close import BACKENDS, NEEDS_CUDA, NEEDS_LIBRARY

from palp_fast.reference.timestep import proposal_ref
from palp_fast.sampler import MODES, TimestepSampler

T = 1000
ALPHAS = torch.linspace(0.999, 0.005, T)
EACH_MODE = pytest.mark.parametrize("mode", MODES)
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def trained(mode: str, alphas=ALPHAS, **options) -> TimestepSampler:
    """A sampler whose statistics (used by adaptive only) say that small t has large gradients."""
    sampler = TimestepSampler(alphas, mode, **options)
    for step in range(20):
        t, _, _ = sampler.sample(32, step)
        sampler.update(t, 0.1 + 5 * torch.exp(-t / 100))
    return sampler


def equal(left, right) -> bool:
    return all(torch.equal(mine.cpu(), its.cpu()) for mine, its in zip(left, right, strict=True))


# (batch, global batch, first sample): no strata to fill, one draw, odd cycles, a part of a batch, more than one block.
BATCHES = [(1, 1, 0), (4, 4, 0), (5, 5, 0), (3, 24, 21), (32, 32, 0), (300, 700, 350), (7, 7, 2**32 - 3), (0, 8, 0)]


@NEEDS_LIBRARY
@EACH_MODE
@pytest.mark.parametrize(("batch", "whole", "offset"), BATCHES)
def test_library_equals_the_reference(mode, batch, whole, offset):
    for timesteps, bins in ((T, 32), (997, 10), (3, 32)):
        alphas = torch.linspace(0.999, 0.005, timesteps)
        options = {"bins": bins, "floor": 0.2, "seed": -7, "rescale": False}
        library, reference = (trained(mode, alphas, **options, backend=name) for name in ("cpu", "reference"))
        assert equal(library.state_dict().values(), reference.state_dict().values())
        for step in (0, 1, 31, 32, 10**6 + 3, -1, -40, 2**40):
            draws = (sampler.sample(batch, step, offset, global_batch=whole) for sampler in (library, reference))
            assert equal(*draws)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_library_adds_up_statistics_as_the_reference(dtype, count):
    """In the same order; norms that are not finite and timesteps outside of the schedule are left out by both."""
    generator = torch.Generator().manual_seed(count)
    samplers = [TimestepSampler(ALPHAS, "adaptive", bins=10, backend=name) for name in ("cpu", "reference")]
    seen = 0
    for _ in range(3):
        t = torch.randint(-2, T + 2, (count, 2), generator=generator)[:, 1]
        norms = torch.rand(count, 3, generator=generator).to(dtype)[:, 2]
        norms[::5], norms[1::7] = float("inf"), float("nan")
        for sampler in samplers:
            sampler.update(t, norms)
        seen = seen * 0.999**count + ((t >= 0) & (t < T) & norms.isfinite()).sum()
    assert equal(*(sampler.state_dict().values() for sampler in samplers))
    assert samplers[0].state_dict()["counts"].sum().item() == pytest.approx(seen.item(), rel=1e-6)


@EACH_BACKEND
def test_statistics_are_decayed_sums(backend):
    sampler = TimestepSampler(ALPHAS, "adaptive", bins=4, backend=backend)
    sampler.update(torch.tensor([0, 999, 10]), torch.tensor([2.0, 3.0, 1.0]))
    sampler.update(torch.tensor([500]), torch.tensor([4.0]))
    state, kept = sampler.state_dict(), 0.999
    assert torch.allclose(state["counts"], torch.tensor([2 * kept, 0, 1, kept], dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(state["squares"], torch.tensor([5 * kept, 0, 16, 9 * kept], dtype=torch.float64), rtol=1e-12)


@EACH_BACKEND
@pytest.mark.parametrize("batch", [1, 4, 8, 5])
def test_a_step_takes_every_stratum_and_a_cycle_every_part(batch, backend):
    sampler = TimestepSampler(ALPHAS, "stratified", backend=backend)
    steps = -(-32 // batch)
    for cycle in (0, 3):
        draws = [sampler.sample(batch, cycle * steps + step)[0] for step in range(steps)]
        for t in draws:
            assert (t * batch // T).sort().values.tolist() == list(range(batch))
        parts = (torch.cat(draws) * (batch * steps)).div(T, rounding_mode="floor")
        assert parts.unique().numel() >= batch * steps - (0 if T % (batch * steps) == 0 else batch)


@EACH_BACKEND
def test_a_large_batch_takes_every_stratum(backend):
    t, weight, _ = TimestepSampler(ALPHAS, "stratified", backend=backend).sample(100, 3)
    assert (t // 10).sort().values.tolist() == list(range(100))
    assert torch.equal(weight, torch.ones(100))


@EACH_BACKEND
@EACH_MODE
def test_draws_do_not_depend_on_ranks(mode, backend):
    sampler = trained(mode, backend=backend)
    whole = sampler.sample(8, 5, global_batch=8)
    for size in (1, 2, 4):
        offsets = range(0, 8, size)
        parts = [sampler.sample(size, torch.tensor(5), torch.tensor(i), global_batch=8) for i in offsets]
        assert equal(whole, [torch.cat(values) for values in zip(*parts)])


@EACH_BACKEND
def test_draws_differ_between_seeds_steps_and_samples(backend):
    sampler, other = (TimestepSampler(ALPHAS, "uniform", seed=seed, backend=backend) for seed in (0, 1))
    assert not torch.equal(sampler.sample(8, 0)[0], other.sample(8, 0)[0])
    assert not torch.equal(sampler.sample(8, 0)[0], sampler.sample(8, 1)[0])
    assert sampler.sample(64, 0)[0].unique().numel() > 50


@EACH_BACKEND
def test_adaptive_weights_are_bounded_and_favour_large_gradients(backend):
    sampler = trained("adaptive", floor=0.25, backend=backend)
    t, weight, _ = sampler.sample(4096, 100)
    assert weight.max() <= 1 / 0.25 + 1e-6
    assert (t < 200).double().mean() > 0.35
    q = sampler.proposal()
    assert abs(q.sum() - 1) < 1e-12
    assert q[0] > 3 * q[-1]


@EACH_BACKEND
def test_the_proposal_is_what_is_drawn_from(backend):
    """Stratified over the batch, so each bin holds its share of it to within two draws."""
    sampler = trained("adaptive", backend=backend)
    t, weight, _ = sampler.sample(20000, 3)
    q = sampler.proposal()
    drawn = torch.bincount(t * 32 // T, minlength=32)
    assert (drawn - 20000 * q).abs().max() < 2
    pi = torch.bincount(torch.arange(T) * 32 // T) / T
    assert torch.allclose(weight, (pi / q)[t * 32 // T].float(), rtol=1e-6)


@EACH_BACKEND
def test_adaptive_starts_uniform_and_ignores_non_finite_norms(backend):
    sampler = TimestepSampler(ALPHAS, "adaptive", backend=backend)
    start = sampler.proposal()
    sampler.update(torch.tensor([3, 900]), torch.tensor([float("nan"), float("inf")]))
    assert torch.equal(sampler.proposal(), start)
    assert torch.equal(sampler.sample(16, 0)[1], torch.ones(16))


def test_estimates_shrink_to_the_mean_while_counts_are_small():
    """One sample of 10 among many of 1: the estimate of its bin is (100 + 4 m) / (1 + 4), m the mean over bins."""
    counts, squares = torch.full((4,), 1e6, dtype=torch.float64), torch.full((4,), 1e6, dtype=torch.float64)
    counts[0], squares[0] = 1, 100
    mean = (100 + 3) / 4
    mass = torch.tensor([((100 + 4 * mean) / 5) ** 0.5, 1, 1, 1], dtype=torch.float64)
    expected = 0.1 / 4 + 0.9 * mass / mass.sum()
    assert torch.allclose(proposal_ref(counts, squares, 100, 0.1), expected, rtol=1e-4)


@EACH_BACKEND
def test_residual_scale(backend):
    t, _, scale = TimestepSampler(ALPHAS, "uniform", rescale=False, backend=backend).sample(32, 0)
    assert torch.allclose(scale, ((1 - ALPHAS[t]) / ALPHAS[t]).sqrt())
    assert torch.equal(TimestepSampler(ALPHAS, "uniform", backend=backend).sample(32, 0)[2], torch.ones(32))


@EACH_BACKEND
def test_state_round_trip_continues_the_run(backend):
    sampler = trained("adaptive", backend=backend)
    copy = TimestepSampler(ALPHAS, "adaptive", backend=backend)
    state = sampler.state_dict()
    assert set(state) == {"counts", "squares"}
    copy.load_state_dict(state)
    assert equal(sampler.sample(8, 50), copy.sample(8, 50))
    with pytest.raises(ValueError, match="counts"):
        TimestepSampler(ALPHAS, "adaptive", bins=16).load_state_dict(state)


@EACH_BACKEND
def test_short_schedule_and_empty_batch(backend):
    sampler = TimestepSampler(torch.tensor([0.9, 0.5, 0.1]), "adaptive", backend=backend)
    assert set(sampler.sample(64, 0)[0].tolist()) == {0, 1, 2}
    for mode in MODES:
        sampler = TimestepSampler(ALPHAS, mode, backend=backend)
        assert [value.shape for value in sampler.sample(0, 0)] == [(0,)] * 3
        sampler.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
        assert torch.equal(sampler.state_dict()["counts"], torch.zeros(32, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["default", "reference"])
def test_opcheck(kind):
    op, sampler = torch.ops.palp_fast, trained("adaptive")
    scale, (counts, squares) = torch.ones(T), sampler.state_dict().values()
    for mode in range(3):
        arguments = (scale, counts, squares, torch.tensor(3), torch.tensor(4), 5, 8, 16, mode, 0.1)
        torch.library.opcheck(getattr(op.timestep_sample, kind), arguments)
    t, norms = torch.tensor([1, 999]), torch.tensor([0.5, 2.0])
    torch.library.opcheck(getattr(op.timestep_update, kind), (counts, squares, t, norms, T, 0.999))


@EACH_BACKEND
@EACH_MODE
def test_a_whole_step_compiles_in_one_graph(mode, backend):
    torch._dynamo.reset()  # it counts compilations of one function over all tests
    samplers = [trained(mode, backend=backend) for _ in range(2)]

    def function(sampler, step):
        t, weight, scale = sampler.sample(4, step, 4, global_batch=8)
        sampler.update(t, weight + scale)
        return t, weight, scale

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for step in (20, 21, torch.tensor(22), torch.tensor(23)):
        assert equal(compiled(samplers[0], step), function(samplers[1], step))
    assert equal(*(sampler.state_dict().values() for sampler in samplers))


@NEEDS_CUDA
class TestCuda:
    @EACH_MODE
    @pytest.mark.parametrize(("batch", "whole", "offset"), BATCHES)
    def test_equals_the_cpu(self, mode, batch, whole, offset):
        device, host = (trained(mode, alphas, bins=10, rescale=False) for alphas in (ALPHAS.cuda(), ALPHAS))
        assert equal(device.state_dict().values(), host.state_dict().values())
        for step in (0, 31, 10**6 + 3, -40):
            there = torch.tensor(step, device="cuda")
            draws = device.sample(batch, there, offset, global_batch=whole)
            assert equal(draws, host.sample(batch, step, offset, global_batch=whole))

    @EACH_MODE
    def test_a_replayed_graph_equals_eager_steps(self, mode):
        replayed, eager = (trained(mode, ALPHAS.cuda()) for _ in range(2))
        step = torch.full((), 20, dtype=torch.int64, device="cuda")
        out = replayed.sample(8, step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = replayed.sample(8, step)
            replayed.update(out[0], out[1] + 0.5)
            step += 1
        for k in range(20, 25):
            graph.replay()
            drawn = eager.sample(8, k)
            eager.update(drawn[0], drawn[1] + 0.5)
            assert equal(out, drawn)
        assert equal(replayed.state_dict().values(), eager.state_dict().values())
