"""One optimizer step on the LoRA of Stable Diffusion 1.x at rank 32: 256 tensors, 6.4 M elements.
python -m bench.bench_optim

Bytes per element: gradient read, parameter read and written (12), moments read and written (fp32 16, 8-bit 4).
bitsandbytes is timed where it is installed.
"""

import statistics
from collections.abc import Callable

import torch

from bench.elementwise import options
from bench.results import Results
from bench.timing import interleaved, waiting
from palp_fast import optim

MOST_OVER_COPY = 1.5
RANK, CONTEXT = 32, 768
BLOCKS = {320: 5, 640: 5, 1280: 6}  # width -> transformer blocks
BYTES = {"AdamW8bit": 16, "Lion8bit": 14}  # per element; 28 with two moments in fp32


def shapes() -> list[tuple[int, int]]:
    """A [r, d_in] and B [d_out, r] of q, k, v and out, in self- and cross-attention."""
    inputs = [(width, width if name in ("q", "out") else context)
              for width, count in BLOCKS.items() for _ in range(count)
              for context in (width, CONTEXT) for name in ("q", "k", "v", "out")]
    return [shape for width, d_in in inputs for shape in ((RANK, d_in), (width, RANK))]


def parameters(device: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.01 * torch.randn(shape, device=device)) for shape in shapes()]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    return params


def providers(device: str) -> dict[str, Callable[[], object]]:
    makers = {
        "torch AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
        "AdamW8bit": optim.AdamW8bit,
        "Lion8bit": optim.Lion8bit,
        "AdamW": optim.AdamW,
        "AdamW8bit reference": lambda params: optim.AdamW8bit(params, backend="reference"),
    }
    try:
        import bitsandbytes
        makers["bitsandbytes AdamW8bit"] = lambda params: bitsandbytes.optim.AdamW8bit(params, min_8bit_size=1)
    except ImportError:
        print("bitsandbytes is not installed: not timed")
    return {name: waiting(make(parameters(device)).step, device) for name, make in makers.items()}


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(lambda: target.copy_(source))


def device_seconds(run: Callable[[], object], rounds: int = 50) -> float:
    """Median seconds on the device, by events."""
    run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def replay() -> bool:
    """AdamW8bit with the norm as a CUDA graph against the time to stream its bytes; False if above MOST_OVER_COPY."""
    params = parameters("cuda")
    optim.AdamW8bit(parameters("cuda")).step()  # loads the kernels
    optimizer = optim.AdamW8bit(params, max_grad_norm=1.0, capturable=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    elements = sum(param.numel() for param in params)
    nbytes = (BYTES["AdamW8bit"] + 4) * elements  # the norm reads the gradients, too
    seconds, least = device_seconds(graph.replay), nbytes / copy_bandwidth()
    print(f"replay of a step with norm: {seconds * 1e6:.1f} us, {seconds / least:.2f}x the time to copy its bytes")
    return seconds <= MOST_OVER_COPY * least


if __name__ == "__main__":
    chosen = options(__doc__)
    elements = sum(rows * columns for rows, columns in shapes())
    print(f"{len(shapes())} tensors, {elements} elements, {chosen.device}")
    rows = interleaved(providers(chosen.device), chosen.seconds)
    results = Results("optim", chosen.device)
    results.add(f"{len(shapes())} tensors, {elements} elements", rows)
    base = rows["torch AdamW fused"].median
    print(f"{'optimizer':24} {'ms':>8} {'p20':>8} {'p80':>8} {'GB/s':>7} {'over torch':>10}")
    for name, row in rows.items():
        rate = next((nbytes for kind, nbytes in BYTES.items() if kind in name), 28) * elements / row.median / 1e9
        times = " ".join(f"{seconds * 1e3:8.2f}" for seconds in row[:3])
        print(f"{name:24} {times} {rate:7.1f} {row.median / base:10.3f}")
    if chosen.record:
        results.write()
    if chosen.device == "cuda" and not replay():
        raise SystemExit(f"slower than {MOST_OVER_COPY}x the copy")
