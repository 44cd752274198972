"""The Triton kernels on a card at sizes of SD1.x: errors, repeatability, CUDA graphs. On the CPU by references."""

import pytest
import torch
from close import NEEDS_CUDA, assert_as_good

from palp_fast import functional as PF

BACKEND = {"cpu": "reference", "cuda": "triton"}
SD = [(4096, 320), (1024, 640), (256, 1280)]
CASES = [("cpu", 6, 16), *(pytest.param("cuda", *size, marks=NEEDS_CUDA) for size in SD)]  # device, rows, width
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HEADS, RANK = 8, 32


def normal(device, *shape, dtype=torch.float32, size=1.0):
    return (size * torch.randn(shape, device=device)).to(dtype)


def results(function, leaves, upstream):
    """[output, gradients to the leaves]."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def compare(ours, plain, leaves, upstream):
    """Our error within twice that of `plain` in the leaves' dtypes, and the same bits when run again."""
    mine, peer = results(ours, leaves, upstream), results(plain, leaves, upstream)
    truth = results(plain, [leaf.double() for leaf in leaves], upstream)
    for i, (found, its, true) in enumerate(zip(mine, peer, truth, strict=True)):
        assert_as_good(found, its, true, 2e-6, f"result {i}")
    assert all(map(torch.equal, mine, results(ours, leaves, upstream)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "rows", "width"), CASES)
def test_geglu(device, rows, width, dtype):
    def plain(x):
        h, g = x.chunk(2, dim=-1)
        return h * torch.nn.functional.gelu(g)

    leaves, upstream = [normal(device, rows, 2 * width, dtype=dtype)], normal(device, rows, width, dtype=dtype)
    compare(lambda x: PF.geglu(x, backend=BACKEND[device]), plain, leaves, upstream)


@pytest.mark.parametrize("keys", ["self", 77])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "rows", "width"), CASES)
def test_attention(device, rows, width, dtype, keys):
    length, shared = (rows, None) if keys == "self" else (keys, torch.tensor([1, 1], device=device))
    leaves = [normal(device, 2, count, width, dtype=dtype) for count in (rows, length, length)]

    def plain(q, k, v):
        k, v = (k, v) if shared is None else (k[shared], v[shared])
        parts = (value.unflatten(-1, (HEADS, -1)).transpose(1, 2) for value in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(-2)

    compare(lambda *qkv: PF.attention(*qkv, HEADS, kv_index=shared, backend=BACKEND[device]), plain, leaves,
            normal(device, 2, rows, width, dtype=dtype))


def projected(device, width, dtype):
    """weight, lora_a, lora_b, a strength per sample."""
    weight = normal(device, width, width, dtype=dtype, size=width**-0.5)
    factors = normal(device, RANK, width, size=width**-0.5), normal(device, width, RANK, size=0.1)
    return weight, *factors, torch.tensor([0.0, 1.0], device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "rows", "width"), CASES)
def test_lora_linear(device, rows, width, dtype):
    weight, *factors, gate = projected(device, width, dtype)

    def plain(x, a, b):
        low = x @ a.to(x.dtype).T @ b.to(x.dtype).T
        return x @ weight.to(x.dtype).T + gate.to(x.dtype).view(2, 1, 1) * low

    compare(lambda x, a, b: PF.lora_linear(x, weight, None, a, b, gate, backend=BACKEND[device]), plain,
            [normal(device, 2, rows, width, dtype=dtype), *factors], normal(device, 2, rows, width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "rows", "width"), CASES)
def test_lora_projections(device, rows, width, dtype):
    parts = [projected(device, width, dtype) for _ in range(3)]
    gate, factors = parts[0][-1], [factor for part in parts for factor in part[1:3]]

    def plain(x, *factors):
        made = []
        for (weight, *_), a, b in zip(parts, factors[::2], factors[1::2]):
            low = x @ a.to(x.dtype).T @ b.to(x.dtype).T
            made.append(x @ weight.to(x.dtype).T + gate.to(x.dtype).view(2, 1, 1) * low)
        return torch.cat(made, dim=-1)

    def ours(x, *factors):
        pairs = list(zip(factors[::2], factors[1::2]))
        packed = PF.Projections.pack([part[0] for part in parts], pairs)
        return torch.cat(PF.lora_projections(x, packed, gate, backend=BACKEND[device]), dim=-1)

    compare(ours, plain, [normal(device, 2, rows, width, dtype=dtype), *factors],
            normal(device, 2, rows, 3 * width, dtype=dtype))


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize(("device", "rows", "width"), CASES)
def test_dequantise(device, rows, width, form):
    weight = PF.quantise(normal("cpu", rows, width), form)
    for dtype in DTYPES:
        for name in ("auto", BACKEND[device]):  # auto is bitsandbytes' kernel where it is able
            assert torch.equal(weight.to(device).dequantise(dtype, backend=name).cpu(), weight.dequantise(dtype))


@pytest.mark.parametrize("kind", ["int8", "fp16"])
@pytest.mark.parametrize(("device", "rows", "width"), CASES)
def test_inexact_products(device, rows, width, kind):
    weight, *factors, gate = projected(device, width, torch.float32)
    weight, x = PF.quantise(weight, "int8"), normal(device, 2, rows, width, dtype=torch.float16)
    truth = PF.lora_linear(x.double(), weight, None, *factors, gate)
    with torch.no_grad(), PF.inexact_products(kind):
        found, peer = (PF.lora_linear(x, weight, None, *factors, gate, backend=name)
                       for name in (BACKEND[device], "reference"))
    assert_as_good(found, peer, truth, 1e-4)


@NEEDS_CUDA
def test_captured_in_a_cuda_graph():
    x = normal("cuda", 2, 256, 320, dtype=torch.float16)
    weight, *factors, gate = projected("cuda", 320, torch.float16)

    def run():
        y = PF.lora_linear(x, weight, None, *factors, gate, backend="triton")
        return PF.attention(y, y, y, HEADS, backend="triton")

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    out.zero_()
    graph.replay()
    assert torch.equal(out, wanted)
