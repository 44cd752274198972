"""attention's kernels against the reference: tiles of many keys, and of few."""

import pytest
import torch
from close import assert_close

from palp_fast import functional as PF
from palp_fast.kernels import attention_cross

TILE = 32  # queries and keys of a tile for fp32 and fp64 heads up to 48 wide; wider ones have half
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
        if values[1].shape[1] == 1:  # gradients to q and k are 0 but for rounding: a step along them is compared
            mine, its = start + mine, start + its
        assert_close(mine, its, tolerance, name)


@pytest.fixture
def many(monkeypatch):
    """Sends few keys the way of many."""
    monkeypatch.setattr(attention_cross, "MOST_KEYS", 0)


@pytest.mark.parametrize("queries", [1, TILE - 1, TILE, TILE + 1])
@pytest.mark.parametrize("keys", [1, TILE - 1, TILE, TILE + 1])
def test_tiles(many, queries, keys):
    agree(*make(queries, keys, 40))


@pytest.mark.parametrize("width", [1, 7, 16, 24, 40, 64, 80, 160])
def test_widths(many, width):
    agree(*make(17, 19, width, torch.float64 if width in (24, 80) else torch.float32))


@pytest.mark.parametrize("kv_index", [None, SHARED], ids=["own", "shared"])
def test_rows_and_prompts(many, kv_index):
    agree(*make(33, 40, 24, rows=3, prompts=3), kv_index=kv_index, softmax_scale=0.3)


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 77, 128])
def test_few_keys(keys):
    agree(*make(33, keys, 40))


@pytest.mark.parametrize("queries", [1, TILE - 1, TILE, TILE + 1])
def test_few_keys_tiles(queries):
    agree(*make(queries, 5, 24))


@pytest.mark.parametrize("width", [7, 24, 48])
def test_few_keys_widths(width):
    agree(*make(33, 19, width, torch.float64 if width == 24 else torch.float32))


@pytest.mark.parametrize("kv_index", [None, SHARED], ids=["own", "shared"])
def test_few_keys_rows_prompts_and_chunks(monkeypatch, kv_index):
    monkeypatch.setattr(attention_cross, "_PROGRAMS", 2)
    monkeypatch.setattr(attention_cross, "_MOST_TILES", 2)
    agree(*make(5 * TILE + 1, 20, 7, rows=3, prompts=3), kv_index=kv_index, softmax_scale=0.3)


@pytest.mark.parametrize("most", [0, 128], ids=["many", "few"])
class TestBothWays:
    @pytest.fixture(autouse=True)
    def way(self, monkeypatch, most):
        monkeypatch.setattr(attention_cross, "MOST_KEYS", most)

    def test_strides_of_a_packed_buffer_amid_nan(self):
        packed = torch.full((2, 34, 3, 3 * HEADS * 40), float("nan"))
        packed[..., 1, :] = torch.randn(2, 34, 3 * HEADS * 40)
        q, k, v = packed[..., 1, :].chunk(3, dim=-1)
        agree(q, k, v, torch.randn(2, HEADS * 40, 34).mT)
        agree(q, k, v, torch.randn(2, 1, 1).expand(q.shape))

    def test_large_logits(self):
        """Some 10^8 either way: a softmax without its maximum taken off would overflow, or divide by 0."""
        q, k, v, upstream = make(5, 40, 24)
        for sign in (1, -1):
            values = sign * 1e4 * q.abs(), 1e4 * k.abs(), v, upstream
            wanted, found = (with_gradients(backend, *values) for backend in ("reference", "triton"))
            assert_close(found[0], wanted[0], 1e-2)
            assert all(gradient.isfinite().all() for gradient in found)

    def test_gradcheck(self):
        leaves = [value.requires_grad_() for value in make(3, 4, 5, torch.float64, rows=3, prompts=3)[:3]]
        for kv_index in (None, SHARED):
            def call(q, k, v):
                return PF.attention(q, k, v, HEADS, kv_index=kv_index, backend="triton")
            assert torch.autograd.gradcheck(call, leaves, fast_mode=True)

    def test_empty(self):
        q, k, v, upstream = make(3, 4, 8, rows=2, prompts=2)
        agree(q[:0], k, v, upstream[:0], kv_index=torch.empty(0, dtype=torch.int64))
        agree(q[:, :0], k, v, upstream[:, :0])

    def test_gradient_to_queries_alone(self):
        q, k, v, upstream = make(33, 20, 24)
        q.requires_grad_()
        wanted, found = (
            torch.autograd.grad(PF.attention(q, k, v, HEADS, backend=backend), q, upstream)[0]
            for backend in ("reference", "triton")
        )
        assert_close(found, wanted, 2e-6)
