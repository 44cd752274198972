"""lora_attention: against its formula in every form, compiled, checkpointed, under autocast; bad input."""

import pytest
import torch
from attention_layer import CONTEXT, FORMS, GATE, HEADS, SHARED, WIDTH, Layer, with_gradients
from close import assert_as_good, assert_close
from torch.utils.checkpoint import checkpoint

from palp_fast import functional as PF


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, form, recompute):
    layer = Layer(form, dtype, length=64)  # enough numbers for the errors of two computations to compare
    for scale in (0.3, GATE):
        mine = with_gradients(layer.fused, layer.leaves(), layer.upstream, lora_scale=scale, recompute=recompute)
        peer = with_gradients(layer.plain, layer.leaves(), layer.upstream, lora_scale=scale)
        truth = with_gradients(layer.plain, layer.leaves(torch.float64), layer.upstream, lora_scale=scale)
        assert mine[0].dtype == dtype and mine[-1].dtype == torch.float32
        for name, found, its, true in zip(["out", *layer.names()], mine, peer, truth, strict=True):
            assert_as_good(found, its, true, 2e-6, name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, recompute):
    layer = Layer(form, torch.float64, torch.float64)
    run = lambda *leaves: layer.fused(*leaves, lora_scale=GATE, recompute=recompute)  # noqa: E731
    assert torch.autograd.gradcheck(run, layer.leaves(), fast_mode=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", ["self", "shared"])
def test_compiled_checkpointed_and_under_autocast(form, recompute):
    layer = Layer(form)
    options = {"lora_scale": GATE, "recompute": recompute}
    wanted = with_gradients(layer.fused, layer.leaves(), layer.upstream, **options)
    torch.compiler.reset()
    compiled = torch.compile(layer.fused, fullgraph=True, backend="aot_eager")
    again = lambda *leaves, **options: checkpoint(layer.fused, *leaves, use_reentrant=False, **options)  # noqa: E731
    for run in (compiled, again):
        for found, truth in zip(with_gradients(run, layer.leaves(), layer.upstream, **options), wanted, strict=True):
            assert_close(found, truth, 1e-6)
    half = Layer(form, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.fused(*layer.leaves(), **options)
    assert found.dtype == torch.float32  # the residual's
    assert_close(found, half.plain(*half.leaves(torch.float64), **options), 2e-2)


def test_unwanted_gradients_are_none_and_x_may_be_strided():
    layer = Layer("shared")
    leaves = [leaf.requires_grad_(i > 1) for i, leaf in enumerate(layer.leaves())]
    leaves[0] = leaves[0].mT.contiguous().mT
    for recompute in (False, True):
        out = layer.fused(*leaves, recompute=recompute)
        found = torch.autograd.grad(out, leaves[2:], layer.upstream)
        wanted = torch.autograd.grad(layer.plain(*leaves), leaves[2:], layer.upstream)
        for mine, true in zip(found, wanted, strict=True):
            assert_close(mine, true, 2e-6)
        assert leaves[0].grad is None


def test_small_update_survives_16_bits():
    layer = Layer("self", torch.bfloat16)
    layer.weights = {name: weight * (name != "out") for name, weight in layer.weights.items()}
    layer.lora["out"] = layer.lora["out"][0], 1e-4 * layer.lora["out"][1]
    layer.bias, layer.inputs["residual"] = layer.bias * 0, layer.inputs["residual"] * 0
    truth = layer.plain(*layer.leaves(torch.float64))
    assert_close(layer.fused(*layer.leaves()), truth, 2e-2)


def test_another_provider_computes_the_same():
    layer = Layer("self")
    weights = PF.AttentionWeights.pack(layer.weights, layer.lora, layer.bias, cross=False)
    x = layer.inputs["x"]
    ours, other = (PF.lora_attention(x, None, weights, HEADS, provider=name) for name in ("auto", "sdpa"))
    assert_close(other, ours, 1e-5)


@pytest.mark.parametrize(("form", "change", "kind", "message"), [
    ("self", {"x": torch.zeros(3, WIDTH)}, ValueError, r"x has shape \[3, 16\]: allowed is \[B, N, d\]"),
    ("self", {"weights": None}, TypeError, "weights=NoneType: allowed is AttentionWeights"),
    ("self", {"context": torch.zeros(3, 4, CONTEXT)}, ValueError, "weights do not fit context.*cross=True"),
    ("cross", {"context": None}, ValueError, "weights do not fit self-attention.*cross=False"),
    ("self", {"kv": (torch.zeros(3, 4, WIDTH),) * 2}, ValueError, "weights do not fit kv"),
    ("cross", {"kv": (torch.zeros(3, 4, WIDTH),) * 2}, ValueError, "context and kv are both given"),
    ("cross", {"context": None, "kv": (torch.zeros(3, 4, 8),) * 2}, ValueError, r"kv\[0\] has shape \[3, 4, 8\]"),
    ("cross", {"context": None, "kv": (torch.zeros(2, 4, WIDTH),) * 2}, ValueError, "kv has 2 prompts for 3 rows of x"),
    ("cross", {"context": torch.zeros(2, 4, CONTEXT)}, ValueError, "context has 2 prompts for 3 rows of x"),
    ("cross", {"kv_index": torch.tensor([0, 3, 0])}, ValueError, "kv_index has values from 0 to 3"),
    ("self", {"heads": 3}, ValueError, "heads=3: allowed is a divisor of 16"),
    ("self", {"softmax_scale": float("nan")}, ValueError, "softmax_scale=nan"),
    ("self", {"provider": "none"}, ValueError, "provider='none'.*: allowed are 'auto'"),
    ("self", {"lora_scale": torch.ones(2)}, ValueError, r"lora_scale has shape \[2\]"),
    ("cross", {"lora_scale": torch.ones(2), "kv_index": SHARED}, ValueError, r"lora_scale has shape \[2\]"),
    ("cross", {"context": torch.zeros(2, 4, CONTEXT), "kv_index": SHARED, "lora_scale": torch.tensor([0.0, 1.0, 0.5])},
     ValueError, "lora_scale has several values for one prompt of kv_index"),
    ("self", {"residual": torch.zeros(3, 5, 1)}, ValueError, r"residual has shape \[3, 5, 1\]"),
    ("self", {"backend": "cpu"}, RuntimeError, "backend='cpu' cannot serve"),
])
@pytest.mark.parametrize("recompute", [False, True])
def test_bad_arguments_are_named(form, change, kind, message, recompute):
    layer = Layer(form)
    weights = PF.AttentionWeights.pack(layer.weights, layer.lora, layer.bias, cross=form == "cross")
    arguments = {"x": layer.inputs["x"], "context": layer.inputs.get("context"), "weights": weights, "heads": HEADS}
    with pytest.raises(kind, match=message):
        PF.lora_attention(**{**arguments, **change}, recompute=recompute)
