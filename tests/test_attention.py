"""attention: against torch's own in every dtype, shared prompts, what it keeps, bad input."""

import math

import pytest
import torch
from close import assert_as_good, assert_close
from saved import saved_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import palp_fast
from palp_fast import functional as PF
from palp_fast.functional import attention_providers
from palp_fast.functional.attention_table import Case

HEADS, WIDTH = 2, 24
SHARED = torch.tensor([1, 0, 1])
LEFT_OUT = torch.tensor([2, 2, 0])  # no row attends to prompt 1


def make(dtype, rows=3, prompts=3, queries=9, keys=7, width=WIDTH):
    shapes = (rows, queries), (prompts, keys), (prompts, keys), (rows, queries)
    return [torch.randn(*shape, HEADS * width, dtype=torch.float64).to(dtype) for shape in shapes]


def plain(q, k, v, heads, *, softmax_scale=None, kv_index=None):
    """The formula in the dtype of its inputs, for autograd."""
    if kv_index is not None:
        k, v = k[kv_index], v[kv_index]
    q, k, v = (value.unflatten(-1, (heads, -1)).transpose(1, 2) for value in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def with_gradients(function, values, **options):
    """[output, gradients to q, k, v]."""
    *leaves, upstream = (value.detach().requires_grad_() for value in values)
    out = function(*leaves, HEADS, **options)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("kv_index", [None, SHARED, LEFT_OUT], ids=["own", "shared", "left out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, kv_index):
    values = make(dtype)
    mine = with_gradients(PF.attention, values, kv_index=kv_index, softmax_scale=0.3)
    peer = with_gradients(plain, values, kv_index=kv_index, softmax_scale=0.3)
    truth = with_gradients(plain, [value.double() for value in values], kv_index=kv_index, softmax_scale=0.3)
    for name, found, its, true in zip(("out", "q", "k", "v"), mine, peer, truth):
        assert found.dtype == dtype
        assert_as_good(found, its, true, 1e-6, name)


@pytest.mark.parametrize("kv_index", [None, SHARED])
def test_gradcheck(kv_index):
    leaves = [value.requires_grad_() for value in make(torch.float64, queries=3, keys=4, width=5)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: PF.attention(q, k, v, HEADS, kv_index=kv_index), leaves)


def test_default_scale_is_that_of_a_head():
    q, k, v, _ = make(torch.float64)
    wanted = PF.attention(q, k, v, HEADS, softmax_scale=1 / math.sqrt(WIDTH))
    assert_close(PF.attention(q, k, v, HEADS), wanted, 1e-14)


def test_slices_of_one_buffer():
    packed = torch.randn(2, 6, 3 * HEADS * WIDTH, dtype=torch.float64)
    q, k, v = packed.chunk(3, dim=-1)
    assert_close(PF.attention(q, k, v, HEADS), plain(q, k, v, HEADS), 1e-13)


def test_large_logits_and_empty_input():
    q, k, v, _ = make(torch.float32)
    assert PF.attention(1e4 * q, 1e4 * k, v, HEADS).isfinite().all()
    assert PF.attention(q[:0], k[:0], v[:0], HEADS).shape == (0, 9, HEADS * WIDTH)
    assert PF.attention(q[:, :0], k, v, HEADS).shape == (3, 0, HEADS * WIDTH)


def test_autocast_and_mixed_dtypes():
    q, k, v, _ = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = PF.attention(q, k, v, HEADS)
    assert torch.equal(out, PF.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), HEADS))
    assert torch.equal(PF.attention(q.bfloat16(), k, v, HEADS), out)


def test_keeps_its_arguments_its_result_and_a_number_per_row():
    q, k, v = (value.requires_grad_() for value in make(torch.float32)[:3])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = PF.attention(q, k, v, HEADS)
    assert [x.data_ptr() for x in kept[:4]] == [x.data_ptr() for x in (q, k, v, out)]
    assert [(x.shape, x.dtype) for x in kept[4:]] == [((3, HEADS, 9), torch.float32)]


def test_gradient_to_queries_alone():
    q, k, v, upstream = make(torch.float64)
    with FlopCounterMode(display=False) as counter:
        out = PF.attention(q.requires_grad_(), k, v, HEADS)
        (found,) = torch.autograd.grad(out, q, upstream)
    assert_close(found, torch.autograd.grad(plain(q, k, v, HEADS), q, upstream)[0], 1e-12)
    assert counter.get_total_flops() == (4 + 6) * q.numel() * k.shape[1]


@pytest.mark.parametrize("kv_index", [None, SHARED])
def test_sdpa_is_another_provider(kv_index):
    values = make(torch.float64)
    mine = with_gradients(PF.attention, values, kv_index=kv_index, provider="sdpa")
    for found, true in zip(mine, with_gradients(plain, values, kv_index=kv_index)):
        assert_close(found, true, 1e-12)


@pytest.mark.parametrize("kv_index", [None, SHARED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_keys_on_the_cpu_have_their_backward_pass_in_fp32(monkeypatch, dtype, kv_index):
    """As good as torch's own in 16 bits; the same tensors are kept."""
    values = make(dtype)
    true, found, kept = with_gradients(plain, [value.double() for value in values], kv_index=kv_index), [], []
    for few in (0, 2**16):
        monkeypatch.setattr(attention_providers, "_FEW_WEIGHTS", few)
        found.append(with_gradients(PF.attention, values, kv_index=kv_index, provider="sdpa"))
        q, k, v, _ = (value.detach().requires_grad_() for value in values)
        kept.append(saved_bytes(lambda: PF.attention(q, k, v, HEADS, kv_index=kv_index, provider="sdpa"), q, k, v))
    for mine, its, exact in zip(found[1], found[0], true):
        assert_as_good(mine, its, exact, 1e-3)
    assert kept[1] == kept[0]
    grads = [torch.autograd.grad(PF.attention(q, k, v, HEADS, kv_index=kv_index, provider="sdpa"), (q, k, v), upstream)
             for upstream in (torch.ones(1, 1, 1, dtype=dtype).expand(3, 9, HEADS * WIDTH),
                              torch.ones(3, HEADS * WIDTH, 9, dtype=dtype).mT)]
    assert all(torch.equal(one, other) for one, other in zip(*grads)), "whatever the strides of the gradient"


@pytest.fixture
def card(monkeypatch):
    """A card that serves everything, to ask which provider a call would take: a function of its arguments."""
    monkeypatch.setattr(attention_providers.backend, "obstacle", lambda *_: None)
    here = {}
    monkeypatch.setattr(attention_providers, "_family", lambda device: here["family"])

    def ask(queries, keys, width, family="consumer", dtype=torch.float16, grad=True, provider="auto"):
        here["family"] = family
        with FakeTensorMode():
            q, k = (torch.empty(1, n, width, dtype=dtype, device="cuda", requires_grad=grad) for n in (queries, keys))
            return attention_providers.choose(q, k, k, 1, provider, "auto")

    return ask


def test_compiled_whole():
    torch.compiler.reset()
    values = make(torch.float32)
    compiled = torch.compile(PF.attention, fullgraph=True, backend="aot_eager")
    mine = with_gradients(compiled, values, kv_index=SHARED)
    for found, wanted in zip(mine, with_gradients(PF.attention, values, kv_index=SHARED)):
        assert_close(found, wanted, 1e-6)


def test_choice(card, monkeypatch):
    assert card(4096, 4096, 40) == "triton"  # atomics are not allowed
    assert card(4096, 4096, 64, grad=False) == "sdpa"
    assert card(4096, 4096, 40, grad=False) == "triton"
    assert card(4096, 4096, 40, "hopper", grad=False) == "sdpa"
    assert card(4096, 77, 64, "hopper", grad=False) == "triton"
    assert card(4096, 77, 40, "turing", grad=False) == "sdpa"
    assert card(4096, 4096, 256) == "reference"
    case = Case("hopper", "float16", 64, 4096, 77, "forward")
    monkeypatch.setitem(attention_providers.TABLE, case, "sdpa_cudnn")
    assert card(4096, 77, 64, "hopper", grad=False) == "sdpa_cudnn"


def test_determinism_excludes_providers(card):
    with pytest.raises(RuntimeError, match="provider='sdpa_cudnn' .* may differ from run to run"):
        card(64, 64, 64, provider="sdpa_cudnn")
    palp_fast.deterministic(False)
    try:
        assert card(64, 64, 64, provider="sdpa_cudnn") == "sdpa_cudnn"
        assert card(4096, 4096, 64) == "sdpa"
    finally:
        palp_fast.deterministic(True)


@pytest.mark.parametrize("change, kind, message", [
    ({"q": torch.zeros(3, 48)}, ValueError, r"q has shape \[3, 48\]: allowed is \[batch, length, heads D\]"),
    ({"q": torch.zeros(3, 9, 48, dtype=torch.int64)}, TypeError, "q has dtype torch.int64"),
    ({"heads": 5}, ValueError, r"q has shape \[3, 9, 48\]: allowed is a last dimension of heads=5 times D >= 1"),
    ({"heads": 0}, ValueError, "heads=0: allowed is an int >= 1"),
    ({"k": torch.zeros(3, 7, 40)}, ValueError, r"k has shape \[3, 7, 40\]: allowed is \[P, M, 48\] with M >= 1"),
    ({"k": torch.zeros(3, 0, 48)}, ValueError, r"k has shape \[3, 0, 48\]: allowed is \[P, M, 48\] with M >= 1"),
    ({"v": torch.zeros(3, 6, 48)}, ValueError, r"v has shape \[3, 6, 48\]: allowed is \[3, 7, 48\]"),
    ({"q": torch.zeros(4, 9, 48)}, ValueError, "k has 3 prompts for 4 rows of q"),
    ({"kv_index": torch.tensor([0, 1, 3])}, ValueError, "kv_index has values from 0 to 3: allowed are 0 to 2"),
    ({"kv_index": torch.tensor([0, 1])}, ValueError, r"kv_index has shape \[2\]: allowed is \[3\]"),
    ({"kv_index": torch.tensor([0.0, 1, 2])}, TypeError, "kv_index: torch.float32 given"),
    ({"softmax_scale": 0.0}, ValueError, "softmax_scale=0.0: allowed is a finite number > 0"),
    ({"provider": "flash"}, ValueError, "provider='flash': allowed are 'auto', 'triton', 'sdpa'"),
    ({"provider": "sdpa_flash"}, RuntimeError, "provider='sdpa_flash' .*: it serves cuda tensors, not cpu"),
    ({"provider": "triton"}, RuntimeError, "provider='triton' cannot serve attention here: Triton serves cuda"),
    ({"provider": "sdpa", "backend": "reference"}, ValueError, "provider='sdpa' with backend='reference'"),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale=inf: allowed is a finite number"),
    ({"backend": "cuda"}, RuntimeError, "backend='cuda' cannot serve attention on cpu"),
])
def test_bad_arguments_are_named(change, kind, message):
    q, k, v, _ = make(torch.float32)
    arguments = {"q": q, "k": k, "v": v, "heads": HEADS, **change}
    with pytest.raises(kind, match=message):
        PF.attention(**arguments)
