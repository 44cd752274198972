"""lora_attention: against its formula in every form, what it keeps, how often it launches, bad input."""

import pytest
import torch
from close import assert_as_good, assert_close
from torch.utils.checkpoint import checkpoint

from palp_fast import functional as PF

HEADS, WIDTH, CONTEXT, RANK = 2, 16, 12, 3
GATE, SHARED = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1, 0, 1])
FORMS = ["self", "cross", "shared", "kv"]


class Layer:
    """Random inputs, weights and factors of one form of the operator, and both ways to compute it."""

    def __init__(self, form, dtype=torch.float32, factor_dtype=torch.float32):
        draw = torch.Generator().manual_seed(0)

        def normal(*shape, dtype=dtype, size=1.0):
            return (size * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

        self.form, width = form, WIDTH if form == "self" else CONTEXT
        inputs = {"q": WIDTH, "k": width, "v": width, "out": WIDTH}
        self.weights = {name: normal(WIDTH, d_in, size=d_in**-0.5) for name, d_in in inputs.items()}
        self.lora = {name: (normal(RANK, d_in, dtype=factor_dtype, size=d_in**-0.5), normal(WIDTH, RANK, dtype=factor_dtype))
                     for name, d_in in inputs.items()}
        self.bias, self.upstream = normal(WIDTH), normal(3, 5, WIDTH)
        self.inputs = {"x": normal(3, 5, WIDTH), "residual": normal(3, 5, WIDTH)}
        if form == "kv":
            self.inputs |= {"k": normal(2, 4, WIDTH), "v": normal(2, 4, WIDTH)}
        elif form != "self":
            self.inputs["context"] = normal(2 if form == "shared" else 3, 4, CONTEXT)
        self.index = SHARED if form in ("shared", "kv") else None

    def names(self):
        """Of what has a gradient: inputs, then the factors."""
        used = ("q", "out") if self.form == "kv" else ("q", "k", "v", "out")
        return [*self.inputs, *((name, i) for name in used for i in (0, 1))]

    def leaves(self, dtype=None):
        values = [*self.inputs.values(), *(self.lora[name][i] for name, i in self.names()[len(self.inputs):])]
        return [value.detach().to(dtype or value.dtype).requires_grad_() for value in values]

    def fused(self, *leaves, weights=None, **options):
        values = dict(zip(self.names(), leaves))
        lora = self.lora | {name: (values[name, 0], values[name, 1]) for name, i in self.names()[len(self.inputs)::2]}
        names = ("q", "out") if self.form == "kv" else ("q", "k", "v", "out")
        dtype = leaves[0].dtype
        packed = PF.AttentionWeights.pack(
            {name: self.weights[name].to(dtype) for name in names}, lora, self.bias.to(dtype),
            cross=self.form in ("cross", "shared"),
        )
        kv = (values["k"], values["v"]) if self.form == "kv" else None
        return PF.lora_attention(values["x"], values.get("context"), packed, HEADS, kv=kv, kv_index=self.index,
                                 residual=values["residual"], **options)

    def plain(self, *leaves, lora_scale=1.0, **_):
        """The formula in the dtype of its inputs, with torch's attention."""
        values, dtype = dict(zip(self.names(), leaves)), leaves[0].dtype

        def project(x, name, scale):
            lora_a, lora_b = (values[name, i].to(dtype) for i in (0, 1))
            scale = scale.to(dtype).view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale
            return x @ self.weights[name].to(dtype).T + scale * (x @ lora_a.T @ lora_b.T)

        x = values["x"]
        source = values.get("context", x)
        source = source if self.index is None or self.form == "kv" else source[self.index]
        if self.form == "kv":
            k, v = values["k"][self.index], values["v"][self.index]
        else:
            k, v = project(source, "k", lora_scale), project(source, "v", lora_scale)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (project(x, "q", lora_scale), k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return project(out, "out", lora_scale) + self.bias.to(dtype) + values["residual"]


def with_gradients(run, leaves, upstream, **options):
    out = run(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, form, recompute):
    layer = Layer(form, dtype)
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


@pytest.mark.parametrize(("form", "change", "kind", "message"), [
    ("self", {"x": torch.zeros(3, WIDTH)}, ValueError, r"x has shape \[3, 16\]: allowed is \[B, N, d\]"),
    ("self", {"weights": None}, TypeError, "weights=NoneType: allowed is AttentionWeights"),
    ("self", {"context": torch.zeros(3, 4, CONTEXT)}, ValueError, "weights do not fit context.*cross=True"),
    ("cross", {"context": None}, ValueError, "weights do not fit self-attention.*cross=False"),
    ("self", {"kv": (torch.zeros(3, 4, WIDTH),) * 2}, ValueError, "weights do not fit kv"),
    ("cross", {"kv": (torch.zeros(3, 4, WIDTH),) * 2}, ValueError, "context and kv are both given"),
    ("cross", {"context": torch.zeros(2, 4, CONTEXT)}, ValueError, "context has 2 prompts for 3 rows of x"),
    ("cross", {"kv_index": torch.tensor([0, 3, 0])}, ValueError, "kv_index has values from 0 to 3"),
    ("self", {"heads": 3}, ValueError, "heads=3: allowed is a divisor of 16"),
    ("self", {"softmax_scale": float("nan")}, ValueError, "softmax_scale=nan"),
    ("self", {"lora_scale": torch.ones(2)}, ValueError, r"lora_scale has shape \[2\]"),
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
