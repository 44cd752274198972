"""The optimizers on a GPU: the CPU's codes, graph replay equal to eager steps, state that moves, no synchronisation."""

import pytest
import torch

from bench.bench_optimizers import SHAPES, sizes
from bench.timing import interleaved
from close import NEEDS_CUDA
from palp_fast import functional
from palp_fast.optim import AdamW8bit, Lion8bit
from palp_fast.sampler import TimestepSampler

pytestmark = NEEDS_CUDA

SIZES = (100_000, 257, 1, 4096)
KINDS = pytest.mark.parametrize("kind", [AdamW8bit, Lion8bit])


def values(seed: int, device: str) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw).to(device) for size in SIZES]


def parameters(device: str) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(value) for value in values(0, device)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def set_grads(params, seed: int) -> None:
    for param, grad in zip(params, values(seed, params[0].device)):
        param.grad.copy_(grad)


def state_of(optimizer, params) -> list[torch.Tensor]:
    return [value.cpu() for param in params for value in optimizer.state[param].values()]


@KINDS
def test_codes_and_parameters_are_the_cpus(kind):
    places = []
    for device in ("cpu", "cuda"):
        params = parameters(device)
        optimizer = kind(params, lr=1e-2, max_grad_norm=1.0, backend=device)
        for step in range(5):
            set_grads(params, step + 1)
            optimizer.step()
        places.append([*(param.detach().cpu() for param in params), *state_of(optimizer, params)])
    assert all(torch.equal(left, right) for left, right in zip(*places, strict=True))


@KINDS
def test_replays_are_the_eager_steps(kind):
    """With an lr that changes and a gradient that is not finite, bit for bit."""
    kind(warm := parameters("cuda"), lr=0.1).step()
    del warm
    eager_params, graph_params = parameters("cuda"), parameters("cuda")
    shadows = {param: torch.empty_like(param, dtype=torch.bfloat16) for param in graph_params}
    eager = kind(eager_params, lr=1e-2, max_grad_norm=1.0)
    replayed = kind(graph_params, lr=1e-2, max_grad_norm=1.0, capturable=True, shadows=shadows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for step in range(6):
        for params, optimizer in ((eager_params, eager), (graph_params, replayed)):
            set_grads(params, step + 1)
            if step == 2:
                params[0].grad[5] = float("nan")
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        replayed.refresh()
        eager.step()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(eager_params, graph_params)), step
    pairs = zip(state_of(eager, eager_params), state_of(replayed, graph_params), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert eager.skipped_steps == replayed.skipped_steps == 1
    assert all(torch.equal(shadow, param.to(torch.bfloat16)) for param, shadow in shadows.items())


def test_a_step_in_a_graph_takes_little_longer_than_its_bytes():
    """Norm and update of SD1.x's LoRA at rank 32, against a copy timed in turns with it."""
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in sizes(*SHAPES["SD1.x"])]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    optimizer = AdamW8bit(params, max_grad_norm=1.0, capturable=True)
    optimizer.step()
    optimizer.refresh()
    graph, source = torch.cuda.CUDAGraph(), torch.randn(2**26, device="cuda")
    with torch.cuda.graph(graph):
        optimizer.step()
    target = torch.empty_like(source)
    calls = {"step": graph.replay, "copy": lambda: target.copy_(source)}
    rows = interleaved(calls, source.device, seconds=2.0, least=50)
    # Gradient read, parameter and two codes read and written.
    nbytes = 16 * sum(param.numel() for param in params)
    streamed = rows["copy"].median * nbytes / (2 * source.nbytes)
    assert rows["step"].median <= 1.5 * streamed, f"{rows['step'].median / streamed:.2f} times its bytes"


@KINDS
def test_state_moves_between_devices(kind):
    params = parameters("cpu")
    optimizer = kind(params, lr=1e-2)
    set_grads(params, 1)
    optimizer.step()
    before = state_of(optimizer, params)
    for device in ("cuda", "cpu"):
        moved = parameters(device)
        other = kind(moved, lr=1e-2)
        other.load_state_dict(optimizer.state_dict())
        assert all(torch.equal(*pair) for pair in zip(before, state_of(other, moved), strict=True))
        optimizer = other


def test_nothing_waits_for_the_device():
    params, alphas = parameters("cuda"), torch.linspace(0.999, 0.01, 1000, device="cuda")
    optimizer = AdamW8bit(params, lr=1e-2, max_grad_norm=1.0)
    optimizer.step()
    sampler, number = TimestepSampler(alphas, "adaptive"), torch.tensor(1, device="cuda")
    images = [torch.randn(4, 4, 64, 64, device="cuda") for _ in range(6)]
    pred = images[0].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        t, weight, scale = sampler.sample(4, number)
        x_t, noise = functional.add_noise(images[1], t, alphas, seed=number, step=number)
        functional.renoise(x_t, images[2], noise, alphas[t])
        loss, stats = functional.score_residual(
            pred, *images[1:], alpha=7.5, beta=3.75, sample_weight=weight, residual_scale=scale)
        loss.backward()
        sampler.update(t, stats[:, 2])
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_is_used():
    """Work waits for what its own stream did before it, and for nothing else."""
    stream, image = torch.cuda.Stream(), torch.zeros(4, 4, 64, 64, device="cuda")
    alpha_bar = torch.full((4,), 0.5, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        image.fill_(1.0)
        made = functional.renoise(image, image, image, alpha_bar)
    stream.synchronize()
    assert torch.equal(made, torch.ones_like(made))
