"""attention's kernels against the reference: tiles of many keys, and of few."""

import pytest
import torch
from close import assert_close

from palp_fast import functional as PF
from palp_fast.kernels import attention_cross

TILE = 32  # queries and keys of a tile for fp32 and fp64
HEADS = 2
SHARED = torch.tensor([2, 0, 2])  # no row attends to prompt 1


def make(queries, keys, width, dtype=torch.float32, rows=1, prompts=1):
    """q, k, v and the gradient of the output."""
    shapes = (rows, queries), (prompts, keys), (prompts, keys), (rows, queries)
    return [torch.randn(*shape, HEADS * width, dtype=dtype) for shape in shapes]


def with_gradients(backend, q, k, v, upstream, **options):
    leaves = [value.detach().requires_grad_() for value in (q, k, v)]
    out = PF.attention(*leaves, HEADS, backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def agree(*values, **options):
    tolerance = 2e-6 if values[0].dtype == torch.float32 else 1e-13
    wanted, found = (with_gradients(backend, *values, **options) for backend in ("reference", "triton"))
    for name, mine, its, start in zip(("out", "q", "k", "v"), found, wanted, values[:1] + values[:3]):
        # With one key, gradients to q and k are 0 but for rounding: a step along them is compared.
        assert_close(start + mine, start + its, tolerance, name) if values[1].shape[1] == 1 else assert_close(
            mine, its, tolerance, name)


@pytest.fixture
def many(monkeypatch):
    """Sends few keys the way of many."""
    monkeypatch.setattr(attention_cross, "MOST_KEYS", 0)


@pytest.mark.parametrize("queries", [1, TILE - 1, TILE, TILE + 1])
@pytest.mark.parametrize("keys", [1, TILE - 1, TILE, TILE + 1])
def test_tiles(many, queries, keys):
    agree(*make(queries, keys, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 16, 24, 40, 64, 80, 160])
def test_widths(many, width, dtype):
    agree(*make(33, 35, width, dtype))


@pytest.mark.parametrize("kv_index", [None, SHARED], ids=["own", "shared"])
def test_rows_and_prompts(many, kv_index):
    agree(*make(33, 40, 24, rows=3, prompts=3), kv_index=kv_index, softmax_scale=0.3)


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 77, 128])
def test_few_keys(keys):
    agree(*make(33, keys, 40))


@pytest.mark.parametrize("queries", [1, TILE - 1, TILE, TILE + 1])
def test_few_keys_tiles(queries):
    agree(*make(queries, 5, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [7, 64, 80, 160])
def test_few_keys_widths(width, dtype):
    agree(*make(33, 19, width, dtype))


@pytest.mark.parametrize("kv_index", [None, SHARED], ids=["own", "shared"])
def test_few_keys_rows_prompts_and_chunks(monkeypatch, kv_index):
    monkeypatch.setattr(attention_cross, "_PROGRAMS", 2)
    monkeypatch.setattr(attention_cross, "_MOST_TILES", 2)
    agree(*make(5 * TILE + 1, 20, 7, rows=3, prompts=3), kv_index=kv_index, softmax_scale=0.3)
